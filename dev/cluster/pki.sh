# shellcheck shell=bash
# cluster/pki.sh - the cluster's own CA, certificates and kubeconfigs, made once per address range (sourced by up.sh).

make_pki() (
  set -e
  [ "$(cat "$PKI/done" 2>/dev/null)" = "$NODE $NET" ] && return 0
  rm -rf "$PKI"
  (umask 077; mkdir -p "$PKI")
  cd "$PKI"
  key=(-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes)
  openssl req -x509 "${key[@]}" -keyout ca.key -out ca.crt -subj /CN=distillation-dev-ca -days 3650

  certificate() { # NAME SUBJECT ALTERNATIVE-NAMES USAGE
    openssl req "${key[@]}" -keyout "$1.key" -out "$1.csr" -subj "$2"
    printf 'basicConstraints=CA:FALSE\nkeyUsage=digitalSignature,keyEncipherment\nextendedKeyUsage=%s\n%s\n' "$4" "${3:+subjectAltName=$3}" > "$1.ext"
    openssl x509 -req -in "$1.csr" -CA ca.crt -CAkey ca.key -CAcreateserial -out "$1.crt" -days 3650 -extfile "$1.ext"
    rm "$1.csr" "$1.ext"
  }
  client() { # NAME SUBJECT : certificate and kubeconfig; self-contained, so that it can be copied anywhere
    certificate "$1" "$2" "" clientAuth
    cat > "$1.conf" <<Y
apiVersion: v1
kind: Config
clusters: [{name: distill, cluster: {server: "https://$NODE_IP:6443", certificate-authority-data: $(base64 -w0 ca.crt)}}]
users: [{name: $1, user: {client-certificate-data: $(base64 -w0 "$1.crt"), client-key-data: $(base64 -w0 "$1.key")}}]
contexts: [{name: distill, context: {cluster: distill, user: $1}}]
current-context: distill
Y
  }
  names=DNS:localhost,DNS:kubernetes,DNS:kubernetes.default,DNS:kubernetes.default.svc,DNS:kubernetes.default.svc.cluster.local
  certificate apiserver /CN=kube-apiserver "IP:127.0.0.1,IP:$API_SERVICE_IP,IP:$NODE_IP,$names" serverAuth
  certificate apiserver-kubelet-client /O=system:masters/CN=kube-apiserver-kubelet-client "" clientAuth
  certificate kubelet-server "/O=system:nodes/CN=system:node:$NODE" "IP:$NODE_IP,DNS:$NODE" serverAuth
  client admin /O=system:masters/CN=admin
  client controller-manager /CN=system:kube-controller-manager
  client scheduler /CN=system:kube-scheduler
  client proxy /CN=system:kube-proxy
  client kubelet "/O=system:nodes/CN=system:node:$NODE"
  client coredns /O=system:masters/CN=coredns
  openssl genrsa -out service-account.key 2048
  openssl rsa -in service-account.key -pubout -out service-account.pub
  echo "$NODE $NET" > "done"                       # last: an interrupted run starts over
)
