#!/bin/bash
# up.sh - brings up a one-node Kubernetes from plain processes: etcd, kube-apiserver, kube-controller-manager,
# kube-scheduler, containerd + runc, kubelet, kube-proxy, CoreDNS; all in one network namespace and below one cgroup.
#
# Safe to run at any time: a running cluster is left alone, a single dead daemon is started again, and after a hard kill
# everything that was left (processes, mounts, namespaces, cgroups, half a store of images) is cleared first.
# What is kept over a restart: certificates and images. What is not: the objects of the cluster.
. "$(dirname "$0")/lib.sh"
. "$DEV/cluster/pki.sh"
FROM=$(now)

need_root
need_disk 5 "$CACHE"
for name in kube-apiserver kube-controller-manager kube-scheduler kubelet kube-proxy kubectl coredns; do
  [ -x "$BIN/$name" ] || die "$BIN/$name is missing: run dev/tools.sh."
done
for name in etcd:etcd-server containerd runc nft:nftables conntrack iptables openssl ip:iproute2 nsenter:util-linux; do
  need_command "${name%%:*}" "${name##*:}"
done
need_gcc
[ ${#STATE} -le 60 ] || die "the path of DISTILL_CLUSTER_STATE is too long for unix sockets (60 characters at most): $STATE"
take_lock

# --- files that daemons read -----------------------------------------------------------------------------------------

write_containerd_config() {
  cat > "$STATE/containerd.toml" <<Y
version = 2
root = "$STATE/containerd"
state = "$STATE/containerd-run"
oom_score = 0
disabled_plugins = ["io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.devmapper", "io.containerd.snapshotter.v1.zfs"]
[grpc]
  address = "$SOCKET"
[plugins."io.containerd.grpc.v1.cri"]
  # A machine without CAP_SYS_RESOURCE may not lower its own OOM score.
  restrict_oom_score_adj = true
  netns_mounts_under_state_dir = true
  sandbox_image = "local.test/pause:1"
  [plugins."io.containerd.grpc.v1.cri".cni]
    bin_dir = "/usr/lib/cni"
    conf_dir = "$STATE/cni/conf"
  [plugins."io.containerd.grpc.v1.cri".containerd]
    snapshotter = "overlayfs"
    default_runtime_name = "runc"
    [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
      runtime_type = "io.containerd.runc.v2"
      [plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc.options]
        SystemdCgroup = false
        Root = "$STATE/containerd-run/runc"
Y
}

# The bridge plugin connects pods; nothing here enforces NetworkPolicy. Policies are accepted by the API server and have
# no effect: what they allow and deny is not tested on this cluster.
write_cni_config() {
  mkdir -p "$STATE/cni/conf"
  cat > "$STATE/cni/conf/10-bridge.conflist" <<Y
{"cniVersion": "0.4.0", "name": "distill", "plugins": [
  {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false, "hairpinMode": true,
   "ipam": {"type": "host-local", "dataDir": "$STATE/cni/ipam", "ranges": [[{"subnet": "$NODE_POD_NET"}]], "routes": [{"dst": "0.0.0.0/0"}]}},
  {"type": "portmap", "capabilities": {"portMappings": true}}]}
Y
}

write_kubelet_config() {
  echo "nameserver 127.0.0.1" > "$STATE/resolv.conf"    # nothing outside of the cluster is resolved for pods
  cat > "$STATE/kubelet.yaml" <<Y
apiVersion: kubelet.config.k8s.io/v1beta1
kind: KubeletConfiguration
failCgroupV1: false
cgroupDriver: cgroupfs
cgroupRoot: /$CGROUP
enforceNodeAllocatable: [pods]
containerRuntimeEndpoint: unix://$SOCKET
failSwapOn: false
address: $NODE_IP
clusterDNS: [$DNS_IP]
clusterDomain: cluster.local
resolvConf: $STATE/resolv.conf
authentication: {anonymous: {enabled: false}, webhook: {enabled: true}, x509: {clientCAFile: $PKI/ca.crt}}
authorization: {mode: Webhook}
tlsCertFile: $PKI/kubelet-server.crt
tlsPrivateKeyFile: $PKI/kubelet-server.key
podLogsDir: $STATE/podlogs
maxPods: 110
nodeStatusUpdateFrequency: 4s
syncFrequency: 10s
serializeImagePulls: false
# The disk belongs to the developer and is shared: a percentage of it says nothing about this cluster. Naming one
# threshold switches off the defaults of all others, so only memory evicts; and images are never collected.
evictionHard: {memory.available: 50Mi}
imageGCHighThresholdPercent: 100
Y
}

write_proxy_config() {
  cat > "$STATE/proxy.yaml" <<Y
apiVersion: kubeproxy.config.k8s.io/v1alpha1
kind: KubeProxyConfiguration
mode: nftables
clusterCIDR: $POD_NET
hostnameOverride: $NODE
clientConnection: {kubeconfig: $PKI/proxy.conf}
conntrack: {maxPerCore: 0}
nodePortAddresses: [$NODE_NET]
Y
}

write_dns_config() {
  cat > "$STATE/Corefile" <<Y
cluster.local in-addr.arpa {
  bind $NODE_IP
  errors
  ready $NODE_IP:8181
  kubernetes cluster.local in-addr.arpa {
    kubeconfig $PKI/coredns.conf
    pods insecure
    ttl 5
  }
  cache 5
}
Y
}

# --- network ---------------------------------------------------------------------------------------------------------
# One pair of interfaces joins the host and the node's namespace. The host routes the cluster's whole /16 there, so that
# its processes reach pods and Services, and an address that no pod has ends in the namespace, never at the machine's
# default gateway. Inside, everything else is unreachable: a pod that tries to leave gets an error at once, not a
# timeout. The route goes with the interface: after down.sh nothing is left.
make_network() {
  [ -e "/run/netns/$NETNS" ] && return 0
  local taken
  taken=$(ip -4 route show root "$NET.0.0/16")
  [ -z "$taken" ] || die "this machine already routes addresses of $NET.0.0/16 ($(echo "$taken" | head -n 1)): set DISTILL_CLUSTER_NET to a free prefix such as 10.123."
  ip netns add "$NETNS"
  ip link add "v$NETNS" type veth peer name eth0 netns "$NETNS"
  ip address add "$HOST_IP/24" dev "v$NETNS"
  ip link set "v$NETNS" up
  nsenter --net="/run/netns/$NETNS" sh -ec "
    ip link set lo up
    ip address add $NODE_IP/24 dev eth0
    ip link set eth0 up
    ip route add $SERVICE_NET via $HOST_IP      # never taken: kube-proxy rewrites it, but only what has a route
    ip route add unreachable default
    sysctl -qw net.ipv4.ip_forward=1
    sysctl -qw net.bridge.bridge-nf-call-iptables=1 || true"
  ip route add "$NET.0.0/16" via "$NODE_IP" dev "v$NETNS"
}

# --- daemons ---------------------------------------------------------------------------------------------------------

start_etcd() { # Debian's 3.4; no fsync, since nothing here outlives the machine
  mkdir -p "$STATE/etcd"
  chmod 700 "$STATE/etcd"
  spawn etcd etcd --data-dir "$STATE/etcd" --unsafe-no-fsync --logger=zap --log-level=warn \
    --listen-client-urls http://127.0.0.1:2379 --advertise-client-urls http://127.0.0.1:2379 --listen-peer-urls http://127.0.0.1:2380
}

start_apiserver() {
  spawn kube-apiserver kube-apiserver --etcd-servers=http://127.0.0.1:2379 \
    --bind-address="$NODE_IP" --advertise-address="$NODE_IP" --secure-port=6443 --service-cluster-ip-range="$SERVICE_NET" \
    --tls-cert-file="$PKI/apiserver.crt" --tls-private-key-file="$PKI/apiserver.key" --client-ca-file="$PKI/ca.crt" \
    --service-account-issuer=https://kubernetes.default.svc \
    --service-account-key-file="$PKI/service-account.pub" --service-account-signing-key-file="$PKI/service-account.key" \
    --authorization-mode=Node,RBAC --enable-admission-plugins=NodeRestriction --allow-privileged=true \
    --kubelet-preferred-address-types=InternalIP --kubelet-certificate-authority="$PKI/ca.crt" \
    --kubelet-client-certificate="$PKI/apiserver-kubelet-client.crt" --kubelet-client-key="$PKI/apiserver-kubelet-client.key"
}

start_controllers() {
  local identity=(--leader-elect=false --bind-address=127.0.0.1)
  for name in controller-manager scheduler; do
    local conf=$PKI/$name.conf extra=()
    [ "$name" = scheduler ] || extra=(--service-account-private-key-file="$PKI/service-account.key" --root-ca-file="$PKI/ca.crt"
      --use-service-account-credentials=true --allocate-node-cidrs=false --node-monitor-grace-period=16s
      --cluster-signing-cert-file="$PKI/ca.crt" --cluster-signing-key-file="$PKI/ca.key")
    spawn "kube-$name" "kube-$name" --kubeconfig="$conf" --authentication-kubeconfig="$conf" --authorization-kubeconfig="$conf" "${identity[@]}" "${extra[@]}"
  done
}

start_containerd() {
  write_containerd_config
  write_cni_config
  spawn containerd containerd -c "$STATE/containerd.toml"
  wait_for 60 containerd ctrk version
}

images() { python3.11 "$DEV/cluster/images.py" --state "$STATE" "$@"; }

replace_store() { # moved first: deleting gigabytes takes minutes, and an interrupted delete is how half stores come about
  stop containerd
  rm -rf "$STATE/containerd-run" "$STATE/images" "$STATE/images.json"
  mv "$STATE/containerd" "$STATE/containerd.broken.$$"
  mkdir -p "$STATE/containerd" "$STATE/containerd-run"
  start_containerd
}

make_pause_image() {
  local folder=$STATE/pause
  mkdir -p "$folder"
  gcc -O2 -static -s -o "$folder/pause" "$DEV/cluster/pause.c"
  images folder --ref local.test/pause:1 --entrypoint /pause --user 65535 "$folder"
}

start_node() {
  write_kubelet_config
  write_proxy_config
  spawn kubelet kubelet --config="$STATE/kubelet.yaml" --kubeconfig="$PKI/kubelet.conf" --root-dir="$STATE/kubelet" --hostname-override="$NODE" --node-ip="$NODE_IP"
  spawn kube-proxy kube-proxy --config="$STATE/proxy.yaml"
}

start_dns() { # a plain process behind the usual Service
  write_dns_config
  spawn coredns coredns -conf "$STATE/Corefile"
  wait_for 60 kube-apiserver kubectl get namespace kube-system  # made a while after the server is ready
  kubectl apply --server-side -f - <<Y
apiVersion: v1
kind: Service
metadata: {name: kube-dns, namespace: kube-system}
spec:
  clusterIP: $DNS_IP
  ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53, protocol: TCP}]
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: kube-dns-1, namespace: kube-system, labels: {kubernetes.io/service-name: kube-dns}}
addressType: IPv4
ports: [{name: dns, port: 53, protocol: UDP}, {name: dns-tcp, port: 53, protocol: TCP}]
endpoints: [{addresses: ["$NODE_IP"]}]
Y
}

node_is_ready() { [ "$(kubectl get node "$NODE" -o 'jsonpath={.status.conditions[?(@.type=="Ready")].status}')" = True ]; }
dns_answers() { nsenter --net="/run/netns/$NETNS" curl -sf "http://$NODE_IP:8181/ready"; }
wait_until_ready() {
  wait_for 60 kube-controller-manager kubectl get serviceaccount default
  wait_for 90 kubelet node_is_ready
  wait_for 90 coredns dns_answers
}

# --- the steps -------------------------------------------------------------------------------------------------------

if cluster_is_up; then
  step "cluster runs already, node and DNS ready" wait_until_ready
  echo "KUBECONFIG=$KUBECONFIG"
  exit 0
fi
# Without these three the others cannot simply go on: pods would be ours no longer, or their objects gone.
fresh=false check=--deep
if ! { alive etcd && alive kube-apiserver && alive containerd && [ -e "/run/netns/$NETNS" ]; }; then
  fresh=true
  if [ -e "$STATE/stopped-cleanly" ]; then check=; fi
  step "clear what an earlier run left" clear_leftovers
fi
mkdir -p "$STATE"/{containerd,containerd-run,kubelet,podlogs} "$RUN" "$LOG"
rm -f "$STATE/stopped-cleanly"
step "certificates" make_pki
make_cgroups
step "network $NET.0.0/16 in namespace $NETNS" make_network
start_etcd
start_apiserver
step "containerd" start_containerd
if $fresh; then
  BROKEN=$(images check $check || true)
  if [ -n "$BROKEN" ]; then
    echo "$BROKEN"
    step "set that store aside and begin a new one" replace_store
  fi
fi
if ! has_image local.test/pause:1; then step "pause image" make_pause_image; fi
step "API server" wait_for 90 kube-apiserver kubectl get --raw /readyz
start_controllers
start_node
step "DNS" start_dns
step "default ServiceAccount, node $NODE and DNS ready" wait_until_ready
if compgen -G "$STATE/containerd.broken.*" >/dev/null; then step "delete the broken image store" rm -rf "$STATE"/containerd.broken.*; fi
echo "cluster is up after $(since "$FROM") s; export KUBECONFIG=$KUBECONFIG"
