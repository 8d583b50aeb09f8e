#!/bin/bash
# images.sh [base|operator|workers|kuberay|kueue|operator@VERSION|all]... - builds the images of the embedded cluster, without a daemon, and hands them to it.
#
# operator/Dockerfile and workers/Dockerfile are the same files that a release is built from; here they stand on a small
# Debian with Python. Their dependencies are one image, named by the hash of what goes into it, the code another: a
# changed line of code costs seconds, an unchanged tree nothing. operator@VERSION is that of a release kept in
# tests/releases, which an upgrade begins from; its tag is the version.
#
# REGISTRY=… images.sh [operator|workers|all] builds and pushes REGISTRY/distillation-{operator,workers}:VERSION instead,
# the workers' from workers/requirements-gpu.lock, on BASE_IMAGE=… if given: a Debian or Ubuntu with Python 3.11 and pip.
# GPU=1 images.sh builds that image of the workers here, and pushes it nowhere.
. "$(dirname "$0")/cluster/lib.sh"

IMAGES=$CACHE/images
BUILDAH=$IMAGES/buildah
BASE_PACKAGES=python3,python3-pip,ca-certificates,bash,curl

need_root
need_command buildah
need_python
WHAT=("$@")
[ ${#WHAT[@]} -gt 0 ] || WHAT=(all)

bu() { # a store of our own: images that the machine has for other purposes are never seen or touched
  buildah --root "$BUILDAH" --runroot "$BUILDAH-run" --storage-driver overlay "$@"
}

images() { python3.11 "$DEV/cluster/images.py" --state "$STATE" "$@"; }

take_turn() { # FD NAME : two builds of one image never run at the same time; the lock goes with its file descriptor
  flock -n "$1" || { echo "waiting for another build of $2"; flock "$1"; }
}

sweep() { # what interrupted builds left; only while nobody builds, since it cannot tell theirs from ours
  exec 6>"$IMAGES/.lock.store"
  if flock -n 6; then
    mounted_in_store | xargs -r umount -l
    if [ -e "$BUILDAH/overlay-images/images.json" ] && ! images whole --store "$BUILDAH"; then
      mv "$BUILDAH" "$BUILDAH.broken"
      rm -rf "$BUILDAH-run"
    fi
    if [ -d "$BUILDAH.broken" ]; then step "delete the broken store of built images" rm -rf "$BUILDAH.broken"; fi
    if [ "$(length_of_list "$BUILDAH/overlay-containers/containers.json")" -gt 0 ]; then step "remove unfinished builds" bu rm --all; fi
  fi
  flock -s 6
}

length_of_list() { python3.11 -c 'import json, sys; print(len(json.load(open(sys.argv[1]))))' "$1" 2>/dev/null || echo 0; }

forget_older() { # NAME:TAG : a build that a newer one replaces; what the cluster runs stays there
  local name
  for name in $(bu images --format '{{.Name}}:{{.Tag}}' | grep "^${1%:*}:" | grep -vxF "$1"); do bu rmi "$name" >/dev/null; done
}

# --- building --------------------------------------------------------------------------------------------------------

build() { # NAME DOCKERFILE ARGUMENT... : one image with the repository as its context
  local name=$1 file=$2 mounts=() path try log
  log=$(mktemp)
  shift 2
  # A build reaches the package index the way this machine does: by its certificates, settings and download cache.
  mkdir -p "$HOME/.cache/uv"
  mounts=(-v "$HOME/.cache/uv:/root/.cache/uv" -v /etc/ssl/certs:/etc/ssl/certs:ro --build-arg UV_NO_CACHE=false)
  for path in /etc/pip.conf /etc/uv/uv.toml; do
    if [ -f "$path" ]; then mounts+=(-v "$path:$path:ro"); fi
  done
  # buildah runs a sealed copy of itself, and the kernel may refuse the seal while it moves that copy's pages: once more.
  for try in 1 2 3; do
    if bu bud --isolation chroot --network host --layers=false --format oci --ignorefile "$DEV/dockerignore" \
      "${mounts[@]}" "$@" -t "$name" -f "$file" "$REPO" 2>&1 | tee "$log"; then
      rm -f "$log"
      return 0
    fi
    grep -q "sealing memfd copy: Device or resource busy" "$log" || break
    echo "try $try: the kernel was busy; once more"
  done
  rm -f "$log"
  return 1
}

built() { images whole --store "$BUILDAH" "$1"; }   # NAME : buildah has it, whole

debian_mirror() { # where this machine gets its own Debian from
  # shellcheck disable=SC2016  # apt-get fills these in
  apt-get indextargets --format '$(REPO_URI) $(CODENAME) $(COMPONENT)' "Identifier: Packages" | awk '$2 == "bookworm" && $3 == "main" {print $1; exit}'
}

make_base_archive() { # ARCHIVE
  local folder=$IMAGES/python-base
  need_command debootstrap
  # An interrupted debootstrap leaves /proc mounted in its folder.
  awk -v folder="$folder/" 'index($2, folder) == 1 {print $2}' /proc/self/mounts | sort -r | xargs -r umount -l
  rm -rf "$folder"
  debootstrap --variant=minbase --include="$BASE_PACKAGES" bookworm "$folder" "$(debian_mirror)"
  rm -rf "${folder:?}"/var/cache/apt/*.bin "$folder"/var/cache/apt/archives/*.deb "$folder"/var/lib/apt/lists/* "$folder"/var/log/*.log "${folder:?}"/dev/*
  tar -C "$folder" -cf "$1.new" .
  mv "$1.new" "$1"
  rm -rf "$folder"
}

BASE_KEY=$(echo "bookworm $BASE_PACKAGES" | sha256sum | cut -c1-16)
LOCAL_BASE=localhost/python-base:$BASE_KEY

add_base_archive() { # ARCHIVE
  printf 'FROM scratch\nADD %s /\nENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin\n' "$(basename "$1")" > "$IMAGES/python-base.Dockerfile"
  bu bud --isolation chroot --layers=false --format oci -t "$LOCAL_BASE" -f "$IMAGES/python-base.Dockerfile" "$IMAGES"
}

build_base() {
  local archive=$IMAGES/python-base-$BASE_KEY.tar
  {
    take_turn 7 python-base
    if ! built "$LOCAL_BASE"; then
      if [ ! -f "$archive" ]; then USUAL="about a minute" step "Debian with Python (debootstrap)" make_base_archive "$archive"; fi
      step "image python-base" add_base_archive "$archive"
    fi
  } 7>"$IMAGES/.lock.python-base"
}

# --- into the cluster ------------------------------------------------------------------------------------------------

in_cluster() { # REF BUILD-ID : containerd has this very build
  [ "$(cat "$STATE/images/${1//\//_}" 2>/dev/null)" = "$2" ] && has_image "$1"
}

note_in_cluster() { # REF BUILD-ID
  mkdir -p "$STATE/images"
  echo "$2" > "$STATE/images/${1//\//_}"
}

mounted_in_store() { awk -v folder="$BUILDAH/" 'index($2, folder) == 1 {print $2}' /proc/self/mounts | sort -r; }

beside_builds() { # COMMAND... : without what other builds have mounted over the store, across which no hard link goes
  # shellcheck disable=SC2016  # of the inner shell
  mounted_in_store | unshare --mount --propagation private bash -c 'xargs -r umount -l; exec "$@" < /dev/null' - "$@"
}

hand_over() { # NAME REF : by hard links; by copy where the two stores lie on different disks
  local status=0
  beside_builds python3.11 "$DEV/cluster/images.py" --state "$STATE" buildah --store "$BUILDAH" --ref "$2" "$1" || status=$?
  [ "$status" -ne 3 ] || { bu push "$1" "oci-archive:$IMAGES/handover.tar:$2" && ctrk images import "$IMAGES/handover.tar" && rm -f "$IMAGES/handover.tar"; status=$?; }
  return "$status"
}

deliver() { # NAME REF BUILD-ID
  if in_cluster "$2" "$3"; then
    echo "$2 is up to date"
    return 0
  fi
  step "$2 into the cluster" hand_over "$1" "$2"
  note_in_cluster "$2" "$3"
}

# --- the images ------------------------------------------------------------------------------------------------------

build_project_image() { # TAG operator|workers CODE-PATH...
  local tag=$1 what=$2 file=$2/Dockerfile requirements=$2/requirements.lock ref=local.test/distillation-$2:$1 dependencies code path
  shift 2
  if [ "$what" = workers ]; then requirements=workers/requirements-cpu.lock; fi
  # The first stage of the Dockerfile, what it installs, and what it stands on.
  dependencies=localhost/$what-dependencies:$( (sed '/^# dev\/images.sh keeps/,$d' "$REPO/$file"; cat "$REPO/$requirements"; echo "$BASE_KEY") | sha256sum | cut -c1-16)
  for path in "$@"; do
    [ -e "$REPO/$path" ] || die "$path does not exist, the image of the $what needs it."
  done
  code=$( (cat "$REPO/$file"; echo "$dependencies"; hash_of_tree "$@") | sha256sum | cut -c1-16)
  if in_cluster "$ref" "$code"; then
    echo "$ref is up to date"
    return 0
  fi
  build_dependencies "$what" "$dependencies"
  if ! built "localhost/distillation-$what:$code"; then
    sed -n '/^FROM dependencies$/,$p' "$REPO/$file" | sed "1s#.*#FROM $dependencies#" > "$IMAGES/$what.Dockerfile"
    step "code of the $what" build "localhost/distillation-$what:$code" "$IMAGES/$what.Dockerfile"
  fi
  deliver "localhost/distillation-$what:$code" "$ref" "$code"
  if [ "$tag" != dev ]; then return 0; fi
  forget_older "localhost/distillation-$what:$code"
  forget_older "$dependencies"
}

OPERATOR_CODE=(crds/distill_api crds/distillationjobs.yaml crds/teachers.yaml operator/distill_operator)

build_release_of_operator() { # VERSION : as above, with what the release was made of for the repository
  local archive=$REPO/tests/releases/$1.tar.gz REPO=$IMAGES/release-$1
  [ -f "$archive" ] || die "there is no release $1 in tests/releases."
  rm -rf "$REPO"
  mkdir -p "$REPO"
  tar -xzf "$archive" -C "$REPO"
  build_project_image "$1" operator "${OPERATOR_CODE[@]}"
  rm -rf "$REPO"
}

build_dependencies() { # operator|workers NAME
  local usual="about 10 seconds"
  build_base
  if ! built "$2"; then
    # buildah keeps up to four copies of what it commits, and the workers' are 7 GB.
    if [ "$1" = workers ]; then need_disk 35 "$CACHE"; usual="3 to 4 minutes the first time (7 GB)"; fi
    USUAL=$usual step "dependencies of the $1" build "$2" "$REPO/$1/Dockerfile" --target dependencies --build-arg BASE_IMAGE="$LOCAL_BASE"
  fi
}

build_binary_image() { # NAME BINARY REFERENCE [TOOLS] : one static binary on nothing
  local folder=$IMAGES/$1 binary=$BIN/$2 reference=$3 key
  [ -x "$binary" ] || die "$binary is missing: run dev/tools.sh${4:+ $4}."
  key=$(stat -c '%s %Y' "$binary" | sha256sum | cut -c1-16)
  if in_cluster "$reference" "$key"; then
    echo "$reference is up to date"
    return 0
  fi
  rm -rf "$folder"
  mkdir -p "$folder"
  ln "$binary" "$folder/manager"
  step "$reference into the cluster" images folder --ref "$reference" --entrypoint /manager --user 65532:65532 "$folder"
  note_in_cluster "$reference" "$key"
}

build_one() {
  {
    take_turn 8 "${1%@*}"
    case $1 in
      base) build_base; deliver "$LOCAL_BASE" local.test/python-base:1 "$BASE_KEY" ;;
      kuberay) build_binary_image kuberay kuberay-operator local.test/kuberay-operator:1.6.1 ;;
      kueue) build_binary_image kueue kueue-manager local.test/kueue:0.19.2 kueue ;;
      operator) build_project_image dev operator "${OPERATOR_CODE[@]}" ;;
      operator@*) build_release_of_operator "${1#*@}" ;;
      workers) build_project_image dev workers crds/distill_api cli/distill_cli workers/distill_workers ;;
    esac
  } 8>"$IMAGES/.lock.${1%@*}"
}

# --- a release -------------------------------------------------------------------------------------------------------

release_one() { # operator|workers
  local version arguments=() name base=${OPERATOR_BASE_IMAGE:-}
  version=$(sed -n 's/^version = "\(.*\)"/\1/p' "$REPO/pyproject.toml")
  name=$REGISTRY/distillation-$1:$version
  if [ "$1" = workers ]; then
    # buildah keeps up to four copies of what it commits, and this environment alone is 13 GB.
    need_disk 60 "$CACHE"
    arguments+=(--build-arg REQUIREMENTS="${REQUIREMENTS:-workers/requirements-gpu.lock}")
    base=$BASE_IMAGE
  fi
  # Each Dockerfile names a plain Python, which OPERATOR_BASE_IMAGE and BASE_IMAGE may replace.
  if [ -n "$base" ]; then arguments+=(--build-arg BASE_IMAGE="$base"); fi
  USUAL="some minutes" step "build $name" build "$name" "$REPO/$1/Dockerfile" "${arguments[@]}"
  if [ "$REGISTRY" != localhost ]; then USUAL="some minutes" step "push $name" bu push "$name" "docker://$name"; fi
}

if [ -n "${GPU:-}" ] && [ -z "$REGISTRY" ]; then
  REGISTRY=localhost
  mkdir -p "$IMAGES"
  if [ -z "$BASE_IMAGE" ]; then build_base; BASE_IMAGE=$LOCAL_BASE; fi
  release_one workers
  exit 0
fi

if [ -n "$REGISTRY" ]; then
  mkdir -p "$IMAGES"
  sweep   # and what is under way here is not swept by others
  for what in "${WHAT[@]}"; do
    case $what in
      all) release_one operator; release_one workers ;;
      base) build_base ;;   # pushed nowhere: what BASE_IMAGE may name
      operator | workers) release_one "$what" ;;
      *) die "only the images operator and workers are released, not '$what'." ;;
    esac
  done
  exit 0
fi

need_cluster
need_disk 5 "$CACHE"
mkdir -p "$IMAGES"
sweep
for what in "${WHAT[@]}"; do
  case $what in
    all) for each in base kuberay operator workers; do build_one "$each"; done ;;
    base | kuberay | kueue | operator | operator@* | workers) build_one "$what" ;;
    *) die "unknown image '$what': base, operator, operator@VERSION, workers, kuberay, kueue or all." ;;
  esac
done
