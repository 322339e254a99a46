"""Hold checkpoints and defenses against figures of their published implementations.

    python -m benchmarks.parity --figures DIR

Every `tapt_*`, `rtpt_*` and `ttc_*.safetensors` in DIR is run on the `clip_*` checkpoint directory
beside it, and every `openclip_NAME.safetensors` on the OpenCLIP checkpoint in `openclip_NAME`. For
each file and quantity the largest absolute difference is printed. Ends with status 1 beyond a
tolerance. What the files hold: see `tests/figures/README.md`.
"""
