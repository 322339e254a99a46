#!/bin/sh
# Classify an image and print the answer as JSON.
# Usage: classify.sh IMAGE LABEL LABEL...
set -eu

image=$1
shift
for label; do
    shift
    set -- "$@" --form-string "labels=$label"
done

# --retry waits as long as a busy server asks for (Retry-After).
exec curl --silent --show-error --fail-with-body --retry 5 \
    ${TAPT_KEY:+--header "Authorization: Bearer $TAPT_KEY"} \
    --form "image=@\"$image\"" "$@" \
    "${CLASSIFY_URL:-http://127.0.0.1:8000}/v1/classify"
