"""`lambda-split serve`: an HTTP server for OpenAI's and Anthropic's clients."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from collections.abc import Sequence
from typing import Annotated, Any

import typer

from split_common.cli.groups import grouped
from split_common.cli.options import JsonOption, given
from split_common.errors import ConfigError
from split_common.models.adapters import parse_adapters
from split_common.models.checkpoint_files import model_name
from split_common.system.console import emit_json, saying_stop, stderr
from split_common.system.process import allow_many_files, leave_out_of_collections, passive_threads
from split_common.system.signals import catch_sigterm, wait_until_set
from split_common.system.text import check_text
from split_device.cli.groups import (
    ConnectionOptions,
    HardwareOptions,
    ImageModelOptions,
    LimitOptions,
    PromptFormatOptions,
    SamplingDefaults,
    TextModelOptions,
)
from split_device.cli.options import SAMPLING_PANEL, AllowedLocalMediaPathOption, StoreKeyOption
from split_device.cli.terminal import loading
from split_device.generation.settings import OPENAI_DEFAULTS, Sampling
from split_device.jobs.job import ImageChoice, ModelChoice
from split_device.serving.hosts import check_host
from split_device.serving.listener import HOST, SHUTDOWN_GRACE, listening, running_server
from split_device.serving.media import media_directories

_API_KEY = "LAMBDA_SPLIT_API_KEY"

#: Options for images only.
_IMAGE_OPTIONS = ("--cut", "--reuse", "--max-images")

#: Options for texts only.
_SAMPLING_OPTIONS = ("--openai-defaults", "--temperature", "--top-p", "--top-k", "--min-p", "--repetition-penalty")
_TEXT_OPTIONS = (
    *_SAMPLING_OPTIONS,
    "--served-model-name",
    "--chat-template",
    "--chat-template-kwargs",
    "--tokenizer",
    "--allowed-local-media-path",
)


@grouped
def serve(
    context: typer.Context,
    model: TextModelOptions,
    images: ImageModelOptions,
    connection: ConnectionOptions,
    hardware: HardwareOptions,
    limits: LimitOptions,
    sampling: SamplingDefaults,
    prompt_format: PromptFormatOptions,
    openai_defaults: Annotated[
        bool,
        typer.Option(
            "--openai-defaults",
            rich_help_panel=SAMPLING_PANEL,
            help="Sample requests that name no temperature as OpenAI does: at temperature 1, from all tokens.",
        ),
    ] = False,
    port: Annotated[
        int,
        typer.Option(min=0, max=65535, metavar="N", help="Port of the loopback; 0 takes a free one."),
    ] = 8080,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            envvar=_API_KEY,
            metavar="KEY",
            help="Key that clients must send. May be repeated: any of the keys will do. Other users can see a "
            "command's options, so prefer LAMBDA_SPLIT_API_KEY, with spaces between several keys.",
        ),
    ] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(
            "--served-model-name",
            metavar="NAME",
            help="What clients call the language model, instead of the checkpoint's name. May be repeated: each is "
            "answered, and the first one is shown.",
        ),
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(
            "--allowed-host",
            metavar="NAME",
            help="Another host name under which clients may reach this server, e.g. host.docker.internal. May be "
            "repeated. Always allowed are localhost, 127.0.0.1 and [::1].",
        ),
    ] = None,
    store_key: StoreKeyOption = None,
    allowed_local_media_path: AllowedLocalMediaPathOption = None,
    json: JsonOption = False,
) -> None:
    """Serve split models to OpenAI's and Anthropic's clients, many requests at once, until Ctrl-C or SIGTERM.

    Offers OpenAI's /v1/chat/completions, /v1/completions, /v1/responses, /v1/images/generations and /v1/models,
    Anthropic's /v1/messages and /v1/messages/count_tokens, vLLM's /tokenize, /detokenize and /version, /health
    and, at /, a page to chat in a browser. It listens on this machine's loopback only: for other
    machines, put a reverse proxy in front of it, and give the proxy's name with --allowed-host.

    Each --adapter is served as one more model, under its own name.

    If --image-model is given and --model is not, only images are served. For temperature, top_p and top_k that a
    request does not set, the options given here apply, or else the checkpoint's values. Needs
    `lambda-split[serve]`. With --json, one object is printed when the server is ready.
    """
    passive_threads()
    if importlib.util.find_spec("starlette") is None or importlib.util.find_spec("uvicorn") is None:
        raise ConfigError("serve needs more packages: pip install 'lambda-split[serve]'")
    if not all(re.fullmatch("[!-~]+", key) for key in api_key or ()):
        raise ConfigError("invalid API key: expected ASCII letters, digits and punctuation, without spaces")
    if not api_key and os.environ.get(_API_KEY):
        raise ConfigError(f"{_API_KEY} is blank: set a key, or unset it to serve without one")
    media = media_directories(allowed_local_media_path or ())
    hosts = [check_host(name) for name in allowed_host or ()]
    stop = catch_sigterm()
    image_choice = None
    if images.image_model is not None:
        image_choice = images.choice()
    elif ignored := given(context, _IMAGE_OPTIONS):
        raise ConfigError(f"{ignored[0]} needs --image-model")
    defaults = _defaults(context, sampling, openai_defaults)
    template = prompt_format.template()
    images_alone = model.model is None and given(context, ["--image-model"])
    if images_alone and (useless := given(context, _TEXT_OPTIONS)):
        raise ConfigError(f"{useless[0]} is for texts: give --model, too")
    choice = model.choice(several_adapters=True) if not images_alone else None
    served = _served(served_model_name or (), choice)
    name, image_name = served[0] if served else None, _name(image_choice)
    adapters = list(parse_adapters(model.adapter or ()))
    if images_alone and adapters:
        raise ConfigError("--adapter is for texts: give --model, too")
    if taken := {*served, image_name}.intersection(adapters):
        raise ConfigError(f"{taken.pop()} is the name of a model and of an adapter: give --adapter another NAME=")
    if image_name in served and served_model_name:
        raise ConfigError(f"{image_name} is the name of the image model: give --served-model-name another one")
    with listening(port) as listener, contextlib.ExitStack() as stack:
        with loading(connection, name, image_name):
            from split_device.jobs.models import Models
            from split_device.serving.dialects import dialects
            from split_device.serving.openai.images import Images
            from split_device.serving.openai.responses.store import ResponseStore
            from split_device.serving.server import CompletionServer
            from split_device.serving.text_model import TextModel

            allow_many_files()
            models = stack.enter_context(Models(connection, limits, hardware))
            text: TextModel | None = None
            image_endpoint: Images | None = None
            if choice and name:
                text = TextModel(
                    *(models.get(choice), choice, name, defaults, template),
                    aliases=served[1:],
                    media=media,
                    image_model=image_name,
                )
            if image_choice and image_name:
                names = text.names if text is not None else []
                image_endpoint = Images(models.pipeline(image_choice), image_name, limits.images, names)
            leave_out_of_collections()
        responses = ResponseStore(store_key)
        stack.callback(responses.close)
        server = CompletionServer(text, dialects(text, responses), image_endpoint, api_key or (), hosts)
        with running_server(server.app(), listener, stop):
            default = text.sampling() if text is not None else None
            with saying_stop(f"answers under way have {SHUTDOWN_GRACE} s to end"):
                _announce(f"http://{HOST}:{listener.getsockname()[1]}/", name, adapters, image_name, default, json)
                wait_until_set(stop)


def _served(names: Sequence[str], choice: ModelChoice | None) -> list[str]:
    """The names of the language model; none without one. Raises ConfigError for a name that is none."""
    if choice is None:
        if names:
            raise ConfigError("--served-model-name is for texts: give --model, too")
        return []
    for index, name in enumerate(names):
        if not check_text(name, "--served-model-name").strip() or name in names[:index]:
            raise ConfigError(f"invalid --served-model-name {name!r}: names must not be empty or repeated")
    return list(names) or [model_name(choice.name)]


def _defaults(context: typer.Context, sampling: Sampling, openai_defaults: bool) -> Sampling:
    """The settings of requests that name none. Raises ConfigError if options contradict each other."""
    if not openai_defaults:
        return sampling.checked()
    if others := given(context, _SAMPLING_OPTIONS[1:]):
        raise ConfigError(f"--openai-defaults and {others[0]} do not go together: both say how to sample")
    return OPENAI_DEFAULTS


def _announce(
    page: str,
    name: str | None,
    adapters: list[str],
    image_name: str | None,
    sampling: Sampling | None,
    json: bool,
) -> None:
    """Prints what is served, where, and how requests that do not say it are sampled."""
    if json:
        facts: dict[str, Any] = {
            "url": f"{page}v1",
            "page": page,
            "model": name,
            "image_model": image_name,
            "pid": os.getpid(),
        }
        facts |= {"adapters": adapters}
        emit_json(facts | {"defaults": sampling.facts() if sampling is not None else None})
    served = " and ".join(each for each in (name, *adapters, image_name) if each)
    default = f"; requests without a temperature: {sampling}" if sampling is not None else ""
    stderr.print(f"serving {served} at {page}v1, and a page to chat at {page}{default}", soft_wrap=True)


def _name(choice: ModelChoice | ImageChoice | None) -> str | None:
    """The name by which clients choose a model."""
    return model_name(choice.name) if choice is not None else None
