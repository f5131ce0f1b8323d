#!/usr/bin/env bash
# Print a file of infra/ with the values of site.env in place of ${NAME}; refuse what is missing or unpinned.
#   infra/fill.sh infra/kuberay/ray-job.training.yaml | kubectl apply -f -
#   SITE_ENV=other.env infra/fill.sh FILE...                # several files become one stream of documents
set -euo pipefail

site=${SITE_ENV:-$(dirname "$0")/site.env}
[[ $# -gt 0 ]] || { echo "usage: infra/fill.sh FILE..." >&2; exit 2; }
[[ -r $site ]] || { echo "error: $site is not there; copy infra/site.env.example and fill it in" >&2; exit 2; }

for file in "$@"; do
  text=$(<"$file")
  # shellcheck disable=SC2016  # the ${...} is looked for, not expanded
  names=$(grep -o '\${[A-Z][A-Z0-9_]*}' "$file" | tr -d '${}' | sort -u || true)
  for name in $names; do
    value=$(sed -n "s/^$name=//p" "$site" | tail -n 1)
    [[ -n $value ]] || { echo "error: $file needs $name, and $site does not set it" >&2; exit 2; }
    if [[ $name == *_IMAGE && ! $value =~ @sha256:[0-9a-f]{64}$ ]]; then
      echo "error: $name=$value in $site is not pinned; give the image with @sha256:... (infra/images/build.sh prints it)" >&2
      exit 2
    fi
    text=${text//"\${$name}"/"$value"}
  done
  [[ $# -eq 1 ]] || echo "---"
  printf '%s\n' "$text"
done
