"""`lambda-split serve`: an HTTP server for OpenAI's clients."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from split_common.cli.options import (
    DEFAULT_BROKER,
    MODEL_PANEL,
    BrokerOption,
    DtypeOption,
    JsonOption,
    KeysOption,
    MemberOption,
    ModelOption,
    RevisionOption,
    TimeoutOption,
    given,
    parse_size,
)
from split_common.console import emit_json, stderr
from split_common.errors import ConfigError, SplitError
from split_common.process import catch_sigterm, passive_threads, wait_for
from split_device.diffusion.options import (
    CodecOption,
    CutOption,
    ReuseOption,
    need_diffusers,
    pipeline_directory,
)
from split_device.jobs.job import ImageChoice, ModelChoice
from split_device.jobs.options import ConcurrencyOption, KvMemoryOption, MaxImagesOption, checkpoint
from split_device.options import HeadOption, PatienceOption, TailOption

if TYPE_CHECKING:
    from starlette.applications import Starlette

HOST = "127.0.0.1"

#: Seconds that open answers have to end when the server does.
GRACE = 2

#: Seconds between two looks at whether the server has begun to listen.
START_INTERVAL = 0.01


def serve(
    context: typer.Context,
    port: Annotated[
        int, typer.Option(min=0, max=65535, metavar="N", help="On the loopback; 0 takes a free one.")
    ] = 8080,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="LAMBDA_SPLIT_API_KEY",
            metavar="KEY",
            help="What clients must send. Better in the environment: other users see a command's options.",
        ),
    ] = None,
    model: ModelOption = None,
    image_model: Annotated[
        str | None,
        typer.Option(
            "--image-model",
            metavar="DIR",
            rich_help_panel=MODEL_PANEL,
            help="Directory of a pipeline, to make images by. Without --model it is served alone.",
        ),
    ] = None,
    broker: BrokerOption = DEFAULT_BROKER,
    max_jobs: ConcurrencyOption = 64,
    max_images: MaxImagesOption = 2,
    kv_memory: KvMemoryOption = None,
    head_layers: HeadOption = 2,
    tail_layers: TailOption = 2,
    cut: CutOption = "C",
    codec: CodecOption = "none",
    reuse: ReuseOption = 1,
    dtype: DtypeOption = "auto",
    revision: RevisionOption = None,
    keys: KeysOption = None,
    member: MemberOption = None,
    timeout: TimeoutOption = 10.0,
    patience: PatienceOption = 60.0,
    json: JsonOption = False,
) -> None:
    """Serve split models to OpenAI's clients on this machine, many requests at once, until Ctrl-C or SIGTERM.

    Offers /v1/chat/completions, /v1/completions, /v1/images/generations, /v1/models, /health and, at /, a page to
    chat in a browser. Needs `lambda-split[serve]`. With --json one object is printed when it is ready.
    """
    passive_threads()
    memory = parse_size(kv_memory) if kv_memory is not None else None
    if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("uvicorn") is None:
        raise ConfigError("serve needs more packages: pip install 'lambda-split[serve]'")
    if api_key is not None and not re.fullmatch("[!-~]+", api_key):
        raise ConfigError("an API key has letters, digits and signs of ASCII, and no spaces")
    stop = catch_sigterm()
    images = None
    if image_model is not None:
        need_diffusers()
        images = ImageChoice(name=pipeline_directory(image_model), cut=cut, codec=codec, reuse=reuse, dtype=dtype)
    elif ignored := given(context, ("cut", "codec", "reuse", "max_images")):
        raise ConfigError(f"{ignored[0]} needs --image-model")
    texts = None
    if model is not None or images is None:
        texts = ModelChoice(
            name=checkpoint(model), revision=revision, head_layers=head_layers, tail_layers=tail_layers, dtype=dtype
        )
    name, image_name = _name(texts), _name(images)
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((HOST, port))
        except OSError as error:
            raise ConfigError(f"port {port} cannot be used: {error.strerror}") from None

        from split_device.jobs.models import Limits, Models, Queue
        from split_device.openai.completions import Completions
        from split_device.openai.images import Images
        from split_device.openai.server import Server

        limits = Limits(max_jobs, memory, max_images)
        with Models(Queue(broker, keys, member, timeout, patience), limits) as models:
            completions = Completions(models.get(texts), texts, name) if texts and name else None
            painting = Images(models.painter(images), image_name) if images and image_name else None
            with answering(Server(completions, painting, api_key).app(), listener, stop):
                served = " and ".join(each for each in (name, image_name) if each)
                page = f"http://{HOST}:{listener.getsockname()[1]}/"
                if json:
                    emit_json(
                        {
                            "url": f"{page}v1",
                            "page": page,
                            "model": name,
                            "image_model": image_name,
                            "pid": os.getpid(),
                        }
                    )
                stderr.print(f"serving {served} at {page}v1, and a page to chat at {page}", soft_wrap=True)
                wait_for(stop)


@contextlib.contextmanager
def answering(app: Starlette, listener: socket.socket, stop: threading.Event) -> Iterator[None]:
    """Has a thread answer HTTP meanwhile. The event is set if that ends by itself.

    Raises:
        SplitError: it cannot listen, or has ended by itself.
    """
    import uvicorn

    failures: list[Exception] = []
    server = uvicorn.Server(
        uvicorn.Config(app, log_level="error", access_log=False, timeout_graceful_shutdown=GRACE, lifespan="off")
    )

    def run() -> None:
        try:
            server.run([listener])
        except Exception as error:
            failures.append(error)
        finally:
            stop.set()

    # The main thread waits for signals.
    thread = threading.Thread(target=run, name="http")
    thread.start()
    try:
        while thread.is_alive() and not server.started:
            time.sleep(START_INTERVAL)
        if server.started:
            yield
        if not thread.is_alive():
            raise SplitError(f"the HTTP server has ended: {failures[0] if failures else 'for no known reason'}")
    finally:
        server.should_exit = True
        thread.join()


def _name(choice: ModelChoice | ImageChoice | None) -> str | None:
    """What clients call a model."""
    if choice is None:
        return None
    return Path(choice.name).name if Path(choice.name).is_dir() else choice.name
