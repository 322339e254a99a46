#!/usr/bin/env bash
# Build an image, run it hardened, classify an image with it, and print its size.
#
#     docker/smoke.sh [cpu|cuda]
#
# Uses docker or podman if one responds, otherwise docker/local.sh as root.
set -euo pipefail
cd "$(dirname "$0")/.."

target=${1:-cpu}
image=tapt-serve:$target # the name that `make image` and compose use

for engine in docker podman; do
    "$engine" info >/dev/null 2>&1 || continue
    "$engine" build --file docker/Dockerfile --target "$target" --tag "$image" .
    gpus=()
    [ "$target" = cuda ] && gpus=(--gpus all)
    container=$("$engine" run --detach --network none --read-only --tmpfs /tmp --cap-drop ALL \
        --security-opt no-new-privileges "${gpus[@]}" "$image")
    trap '"$engine" rm --force "$container" >/dev/null' EXIT
    "$engine" exec --interactive "$container" python - <docker/ask.py
    "$engine" stop -t 40 "$container" >/dev/null
    status=$("$engine" inspect --format '{{.State.ExitCode}}' "$container")
    [ "$status" = 0 ] || { echo "the service ended with status $status" >&2; exit 1; }
    "$engine" image inspect --format '{{.Size}}' "$image" |
        awk -v image="$image" '{printf "%s: %d MiB\n", image, $1 / 1048576}'
    exit
done

echo "no container engine answers; building with buildah" >&2
docker/local.sh build "$target"
docker/local.sh run "localhost/$image" docker/ask.py
docker/local.sh size "localhost/$image"
