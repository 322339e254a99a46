#!/usr/bin/env bash
# Build what a release publishes: the wheel into dist/, and both images.
#
#     docker/release.sh REGISTRY
#
# The version is the one in pyproject.toml. Its commit must be tagged and CHANGELOG.md must have its
# section. Nothing is pushed or signed: docs/release.md says how to do that.
set -euo pipefail
cd "$(dirname "$0")/.."

registry=${1:?the registry, such as ghcr.io/tapt-serve}
uv=${UV:-.venv/bin/uv}
version=$(sed -n 's/^version = "\(.*\)"$/\1/p' pyproject.toml)

stop() {
    echo "$1" >&2
    exit 1
}

[ -z "$(git status --porcelain)" ] || stop "The checkout has changes: commit them first."
[ -n "$(git tag --points-at HEAD --list "v$version")" ] ||
    stop "This commit is not tagged v$version, the version in pyproject.toml."
grep -q "^## $version " CHANGELOG.md || stop "CHANGELOG.md has no section '## $version (DATE)'."

rm -rf dist
"$uv" build --wheel --out-dir dist
(cd dist && sha256sum -- *.whl >SHA256SUMS)

for engine in docker podman; do
    "$engine" info >/dev/null 2>&1 || continue
    for target in cpu cuda; do
        "$engine" build --file docker/Dockerfile --target "$target" \
            --tag "$registry/tapt-serve:$version-$target" .
    done
    exit
done
stop "dist/ has the wheel. The images were not built: neither docker nor podman answers."
