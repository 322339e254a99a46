#!/usr/bin/env bash
# Build and run the images without a Docker engine: the same Dockerfiles, built by Debian's buildah
# as root, on a base made by debootstrap. Nothing is pulled from a registry.
#
#     docker/local.sh build cpu|cuda|gateway          # makes localhost/tapt-serve:TARGET
#     docker/local.sh run IMAGE SCRIPT [FROM:TO...]   # start it; pipe SCRIPT to its Python
#     docker/local.sh size IMAGE
#
# WHEELS=DIR is a directory of wheels to use in addition to the index. PIP_INDEX_URL, TORCH_INDEX
# and DEBIAN_MIRROR replace the default addresses. STORE is the directory of the images.
set -euo pipefail
cd "$(dirname "$0")/.."

STORE=${STORE:-$PWD/.cache/images}
RELEASE=${RELEASE:-bookworm}
DEBIAN_MIRROR=${DEBIAN_MIRROR:-http://deb.debian.org/debian}
BASE=localhost/debian:$RELEASE
AUTHORITIES=/etc/ssl/certs/ca-certificates.crt # of this machine; may include a proxy's

tool() {
    local command=$1
    shift
    buildah --root "$STORE/graph" --runroot "$STORE/run" --storage-driver vfs "$command" "$@"
}

make_base() {
    local container root
    container=$(tool from scratch)
    root=$(tool mount "$container")
    debootstrap --variant=minbase --include=ca-certificates "$RELEASE" "$root" "$DEBIAN_MIRROR" >&2
    # Debian's slim images leave these out, too.
    rm -rf "$root"/var/cache/apt/* "$root"/var/lib/apt/lists/* "$root"/var/log/* \
        "$root"/usr/share/{doc,man,info,locale,groff,lintian}/*
    tool config --cmd bash "$container"
    tool commit --quiet --format docker --signature-policy docker/policy.json --rm \
        "$container" "$BASE" >&2
}

build() {
    local target=$1 file=docker/Dockerfile wheels=${WHEELS:-}
    local -a options=(--target "$target")
    if [ "$target" = gateway ]; then
        file=docker/gateway/Dockerfile options=()
    fi
    [ -z "$wheels" ] && wheels=$STORE/wheels && mkdir -p "$wheels"
    [ -n "${PIP_INDEX_URL:-}" ] && options+=(--build-arg "PIP_INDEX_URL=$PIP_INDEX_URL")
    [ -n "${TORCH_INDEX:-}" ] && options+=(--build-arg "TORCH_INDEX=$TORCH_INDEX")
    [ -e "$AUTHORITIES" ] && options+=(--volume "$AUTHORITIES:$AUTHORITIES:ro")
    tool inspect --type image "$BASE" >/dev/null 2>&1 || make_base
    tool build --file "$file" --format docker --isolation chroot --pull=never \
        --signature-policy docker/policy.json --build-arg "BASE=$BASE" \
        --build-context "wheels=$wheels" --tag "localhost/tapt-serve:$target" \
        "${options[@]}" .
}

# Run the container hardened: its own user, a read-only root, its own /tmp, only a loopback network,
# no capabilities, FROM mounted read-only at TO. EXTRA contains more variables. The exit status is
# that of the script, of the health check, or of the service if it does not stop cleanly on SIGTERM.
run() {
    local image=$1 script=$2 container root status=0
    container=$(tool from --pull-never --signature-policy docker/policy.json "$image")
    root=$(tool mount "$container")
    tool inspect --type image "$image" | python3 -c "
import json, shlex, sys
config = json.load(sys.stdin)['Docker']['config']
print('user=' + shlex.quote(config['User']))
print('env=(' + shlex.join(config['Env']) + ')')
print('start=(' + shlex.join(config['Entrypoint'] + (config['Cmd'] or [])) + ')')
print('check=(' + shlex.join(config['Healthcheck']['Test'][1:]) + ')')
" >"$STORE/config"
    unshare --mount --net --pid --fork --kill-child bash -euo pipefail -s "$root" "$STORE/config" \
        "$script" "${@:3}" <<'INSIDE' || status=$?
root=$1 script=$3
. "$2"
read -ra extra <<<"${EXTRA:-}"
ip link set lo up 2>/dev/null || python3 -c "
import fcntl, socket, struct
up = struct.pack('16sh', b'lo', 1)
fcntl.ioctl(socket.socket(socket.AF_INET, socket.SOCK_DGRAM), 0x8914, up)"
mount --bind "$root" "$root"
mount -t proc proc "$root/proc"
mount --bind /dev "$root/dev"
mount -t tmpfs tmpfs "$root/tmp"
for pair in "${@:4}"; do mount --bind -o ro "${pair%%:*}" "$root${pair##*:}"; done
mount -o remount,bind,ro "$root"
inside=(chroot "$root" /usr/bin/env -i "${env[@]}" "${extra[@]}"
    /usr/bin/setpriv --reuid "${user%%:*}" --regid "${user##*:}" --clear-groups --no-new-privs
    --bounding-set -all --inh-caps -all)
"${inside[@]}" "${start[@]}" & service=$!
"${inside[@]}" python - <"$script"
"${inside[@]}" "${check[@]}"
kill -TERM $service
wait $service
INSIDE
    tool rm "$container" >/dev/null
    return $status
}

size() {
    local container root
    container=$(tool from --pull-never --signature-policy docker/policy.json "$1")
    root=$(tool mount "$container")
    du -sm --apparent-size "$root" | awk -v image="$1" '{print image ": " $1 " MiB"}'
    tool rm "$container" >/dev/null
}

for need in buildah debootstrap; do
    type -P $need >/dev/null || {
        echo "$need is missing: apt-get install --no-install-recommends buildah debootstrap" >&2
        exit 1
    }
done
[ "$(id -u)" -eq 0 ] || { echo "this needs root, for chroot and mounts" >&2; exit 1; }
mkdir -p "$STORE"
"$@"
