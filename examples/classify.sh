#!/bin/sh
# Print the service's answer about an image as JSON.
# usage: classify.sh IMAGE LABEL LABEL...
set -eu

image=$1
shift
for label; do
    shift
    set -- "$@" --form-string "labels=$label"
done

# A busy server says when to come back (Retry-After), and --retry listens.
exec curl --silent --show-error --fail-with-body --retry 5 \
    ${CLASSIFY_KEY:+--header "Authorization: Bearer $CLASSIFY_KEY"} \
    --form "image=@\"$image\"" "$@" \
    "${CLASSIFY_URL:-http://127.0.0.1:8000}/v1/classify"
