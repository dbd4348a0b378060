"""`gengram serve`: a model that answers over HTTP."""

import argparse
import contextlib
import socket

HELP = "answer over HTTP: completions, embeddings and scores of variants"

_SECONDS_TO_FINISH = 60  # what answers on their way have when the server is asked to end


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of `gengram serve`."""
    parser.add_argument(
        "model", nargs="?", help="folder or Hub id; gengram-mini, which ships with the package, by default"
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (%(default)s, which only this machine reaches)"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes one that is free (%(default)s)")
    parser.add_argument("--name", help="what the model is called in answers; by default its folder or id")
    parser.add_argument("--revision", help="branch, tag or commit of a model on the Hub")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="(%(default)s)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, ...; by default the first GPU if there is one")
    limits = parser.add_argument_group("limits; what exceeds them gets an error that says so")
    for name, default, words in (
        ("batch-tokens", 16384, "bases that the model reads at once"),
        ("most-bases", 16384, "bases of a sequence, new ones included"),
        ("most-sequences", 256, "sequences of a request"),
        ("most-waiting", 1024, "sequences that wait"),
        ("most-bytes", 8 << 20, "bytes of a request"),
    ):
        limits.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"{words} (%(default)s)")
    parser.add_argument("--quiet", "-q", action="store_true", help="no line for each request")


def run(arguments: argparse.Namespace) -> int:
    """Serve until Control-C or SIGTERM; answers on their way are finished.

    Raises:
        ValueError: if the model or an option cannot be used.
        OSError: if there is no such model, or the address is taken.
        MissingExtraError: if a library of the extra `serve` is not installed.
    """
    from ..inference.jobs import ModelOptions
    from ..inference.loaded_model import head_of
    from ..inference.serving.served_model import ServedModel
    from ..support.default_model import model_name
    from ..support.errors import MissingExtraError

    try:
        import uvicorn

        from ..inference.serving.server import Limits, names_of, serving_app
    except ImportError as error:
        raise MissingExtraError(f"gengram serve needs {error.name}: pip install 'gengram[serve]'") from error

    limits = Limits(arguments.most_bases, arguments.most_sequences, arguments.most_waiting, arguments.most_bytes)
    given = {name: getattr(arguments, name) for name in ("revision", "dtype", "device", "batch_tokens")}
    options = ModelOptions(**given) if arguments.model is None else ModelOptions(arguments.model, **given)
    with listening_socket(arguments.host, arguments.port) as listening:
        served = ServedModel(options.load(head_of(options.load_config()) or "causal"), options.batch_tokens)
        host, port = listening.getsockname()[:2]
        names = names_of(host)
        name = arguments.name or model_name(options.model)
        app = serving_app(served, name, limits, names)
        level = "warning" if arguments.quiet else "info"
        config = uvicorn.Config(
            app, log_level=level, server_header=False, timeout_graceful_shutdown=_SECONDS_TO_FINISH
        )
        shown = f"[{host}]" if ":" in host else host
        print(f"serving {name} at http://{shown}:{port} (Control-C ends it)", flush=True)
        if options.dtype != "float32":
            print(
                f"in {options.dtype} a seed may give other bases while others ask; in float32 it gives the same",
                flush=True,
            )
        if names is None:
            print("anybody who reaches this address can use it; there is no password", flush=True)
        with contextlib.suppress(KeyboardInterrupt):  # which uvicorn raises again when it has ended
            uvicorn.Server(config).run(sockets=[listening])
    return 0


def listening_socket(host: str, port: int) -> socket.socket:
    """A socket whose connections send every packet at once.

    asyncio sees to that for sockets of its own only. Otherwise the second packet of an answer waits, 40 ms on Linux,
    until the client has confirmed the first.

    Raises:
        ValueError: if there is no such port.
        OSError: if the address is taken, or is none of this machine's.
    """
    if not 0 <= port <= 65535:
        raise ValueError(f"port: expected 0 to 65535, got {port}.")
    listening = socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    listening.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # connections have it from here
    return listening
