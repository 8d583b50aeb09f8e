#!/bin/bash
# setup.sh - makes a fresh Debian 12 able to develop and test this project: Debian packages, uv, and the two Python
# environments operator/.venv and workers/.venv. Does nothing when nothing has changed; can be interrupted and run again.
. "$(dirname "$0")/lib.sh"

# The container runtime, what it needs to connect pods, etcd, image building, metrics, a browser for the tests of pages;
# and what the scripts call.
PACKAGES=(containerd runc containernetworking-plugins iptables nftables conntrack etcd-server
  buildah debootstrap docker-registry prometheus chromium-headless-shell
  gcc libc6-dev make curl openssl iproute2 procps util-linux ca-certificates)

missing_packages() {
  dpkg-query -W -f '${db:Status-Status} ${Package}\n' "${PACKAGES[@]}" 2>/dev/null | awk '$1 == "installed" {print $2}' | sort \
    | comm -13 - <(printf '%s\n' "${PACKAGES[@]}" | sort)
}

install_packages() { # services of these packages stay off: the cluster starts its own
  local guard=
  if [ ! -e /usr/sbin/policy-rc.d ]; then
    guard=/usr/sbin/policy-rc.d
    printf '#!/bin/sh\nexit 101\n' > "$guard"
    chmod +x "$guard"
  fi
  apt-get -o DPkg::Lock::Timeout=300 update -qq
  DEBIAN_FRONTEND=noninteractive apt-get -o DPkg::Lock::Timeout=300 install -y -qq --no-install-recommends "$@"
  if [ -n "$guard" ]; then rm -f "$guard"; fi
}

uv() { python3.11 -m uv "$@"; }

install_uv() { python3.11 -m pip install --quiet --break-system-packages "uv==$UV_VERSION" || python3.11 -m pip install --quiet "uv==$UV_VERSION"; }

launcher() { # FILE PYTHON MODULE FUNCTION : what an installed entry point would be
  printf '#!%s\nimport sys\n\nfrom %s import %s\n\nsys.exit(%s())\n' "$2" "$3" "$4" "$4" > "$1"
  chmod +x "$1"
}

environment() { # operator|workers
  local venv=$REPO/$1/.venv
  if [ "$("$venv/bin/python" -c 'import sys; print(*sys.version_info[:2], sep=".")' 2>/dev/null)" != 3.11 ]; then
    uv venv --quiet --clear --python python3.11 "$venv"
  fi
  # Compiled now: with PYTHONDONTWRITEBYTECODE set, as on some machines, every process would compile everything again.
  uv pip sync --quiet --require-hashes --compile-bytecode --python "$venv/bin/python" "$REPO/$1/requirements-dev.lock"
}

first_party() { # operator|workers : the packages of this repository, importable in place
  local venv=$REPO/$1/.venv
  printf '%s\n' "$REPO/crds" "$REPO/operator" "$REPO/cli" "$REPO/workers" > "$venv/lib/python3.11/site-packages/distill.pth"
  launcher "$venv/bin/distill" "$venv/bin/python" distill_cli.main main
  if [ "$1" = operator ]; then
    launcher "$venv/bin/kubectl-distill" "$venv/bin/python" distill_cli.main main
    launcher "$venv/bin/kubectl_complete-distill" "$venv/bin/python" distill_cli.kubectl_completion for_kubectl
    launcher "$venv/bin/distill-operator" "$venv/bin/python" distill_operator.__main__ main
  fi
}

need_python
mapfile -t absent < <(missing_packages)
if [ ${#absent[@]} -gt 0 ]; then
  need_root
  USUAL="half a minute" step "Debian packages: ${absent[*]}" install_packages "${absent[@]}"
fi
need_gcc
if [ "$(uv --version 2>/dev/null | cut -d' ' -f2)" != "$UV_VERSION" ]; then step "uv $UV_VERSION" install_uv; fi

for side in operator workers; do
  stamp=$REPO/$side/.venv/.set-up
  key=$(python3.11 -V | cat - "$REPO/$side/requirements-dev.lock" "$DEV/setup.sh" | sha256sum | cut -c1-16)
  [ "$(cat "$stamp" 2>/dev/null)" != "$key$REPO" ] || continue
  need_disk 12 "$REPO"
  USUAL="a minute or two the first time" step "Python packages of the $side" environment "$side"
  first_party "$side"
  echo "$key$REPO" > "$stamp"                    # last: an interrupted run starts over
done
