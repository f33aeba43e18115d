#!/bin/sh
# Starts Redis (or the server in REDIS_SERVER) with the users of users.acl in the same directory. The password of the user
# `ktrdr` comes from KTRDR_REDIS_PASSWORD; only its SHA-256 is stored.
set -eu

: "${KTRDR_REDIS_PASSWORD:?must be set to the password of the user ktrdr}"
hash=$(printf %s "$KTRDR_REDIS_PASSWORD" | sha256sum | cut -d ' ' -f 1)
unset KTRDR_REDIS_PASSWORD
users=${TMPDIR:-/tmp}/users.acl
umask 077
sed "s/#PASSWORD_SHA256/#$hash/" "$(dirname "$0")/users.acl" > "$users"
exec "${REDIS_SERVER:-redis-server}" "$@" --aclfile "$users"
