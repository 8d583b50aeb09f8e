"""`python -m distill_workers.serving.sglang_launch ARGS` is `python -m sglang.launch_server ARGS` whose administration
needs the job's key (admin_key.py), which comes by the environment and so stands in no process list.
"""

import logging
import os
import sys
from typing import Any

from distill_workers import stacks
from distill_workers.serving.admin_key import AdminKeyMiddleware, admin_key, bearer

log = logging.getLogger(__name__)

# Here, since SGLang spawns its processes: each of them imports this module anew.
stacks.on_signal()

FREEZE_SECONDS = 60.0
"""Timeout of freeze_gc: the scheduler answers between two batches, and the first may be long."""


def unguarded_servers(args: Any, *, rust_server: bool) -> list[str]:
    """Return the options, of SGLang's resolved arguments, that start a server around which there is no middleware."""
    options = {
        "--tokenizer-worker-num above 1": args.tokenizer_worker_num > 1,
        "--grpc-port": args.grpc_port is not None,
        "--smg-grpc-mode": args.smg_grpc_mode or args.grpc_mode,
        "--encoder-only": args.encoder_only,
        "--use-ray": args.use_ray,
        "SGLANG_RUST_SERVER": rust_server,
    }
    return [name for name, used in options.items() if used]


def freeze_gc(url: str, key: str, verify: bool | str) -> None:
    """Send the request that SGLang sends to itself after its warm-up, with the key.

    Without a warm-up it is sent before the server listens, so it is retried.
    """
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.util import Retry

    try:
        with requests.Session() as session:
            session.trust_env = False  # the key is for this server, not for a proxy
            session.mount(url, HTTPAdapter(max_retries=Retry(20, backoff_factor=0.1, backoff_max=1.0)))
            answer = session.post(f"{url}/freeze_gc", headers=bearer(key), timeout=FREEZE_SECONDS, verify=verify)
            answer.raise_for_status()
    except requests.exceptions.RequestException as error:
        # Logged and not raised, as SGLang does: the server is only a little slower.
        log.warning("freeze_gc failed: %s", error)


def install_key_guard(key: str) -> None:
    """Add the middleware to SGLang's application, and the key to the one request that SGLang sends to itself."""
    from sglang.srt.arg_groups.serving_hook import ssl_verify_of
    from sglang.srt.entrypoints import http_server

    http_server.app.add_middleware(AdminKeyMiddleware, key=key)
    http_server._freeze_gc_after_server_warmup = lambda args: freeze_gc(args.url(), key, ssl_verify_of(args))


def main() -> None:
    from sglang.launch_server import run_server
    from sglang.srt.arg_groups.overrides import resolving_view
    from sglang.srt.environ import envs
    from sglang.srt.plugins import load_plugins
    from sglang.srt.server_args import prepare_server_args
    from sglang.srt.utils import kill_process_tree

    load_plugins()
    server_args = prepare_server_args(sys.argv[1:])
    server_args.resolve_once()
    if options := unguarded_servers(resolving_view(server_args), rust_server=envs.SGLANG_RUST_SERVER.get()):
        sys.exit(f"engineArgs: {', '.join(options)}: serves without the key that administration requires; leave it out")
    install_key_guard(admin_key())
    try:
        run_server(server_args)
    finally:
        kill_process_tree(os.getpid(), include_parent=False)


if __name__ == "__main__":
    main()
