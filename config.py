"""Settings and Limits: the only reader of the environment and the only home of numeric limits.

`load_settings()` merges `.env` with the process environment (the environment wins), refuses unknown names that
carry our prefixes, and reports every mistake at once. `python -m config` prints the effective configuration;
`python -m config --get NAME` prints one value.

This file does not look at model folders: `models/snapshots.py` does.
"""

from __future__ import annotations

import argparse
import os
import re
import sys
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal

from dotenv import dotenv_values
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    model_validator,
)

VERSION = "0.4.0"
PROJECT_ROOT = Path(__file__).resolve().parent
PREFIXES = ("AVITO_", "AVIBE_", "AVISION_")
MIN_OPS_TOKEN_CHARS = 16
# An answer that begins at the deadline still has to be written out before the worker may go.
GRACE_MARGIN_S = 10.0

DType = Literal["auto", "float16", "bfloat16", "float32"]


class ConfigError(Exception):
    """The configuration has mistakes. `mistakes` holds one sentence for each, secrets masked."""

    def __init__(self, mistakes: Sequence[str]) -> None:
        super().__init__("; ".join(mistakes))
        self.mistakes = list(mistakes)


@dataclass(frozen=True)
class Limits:
    """Every numeric limit that a request can meet. Units are in the names; a limit is the last value that passes."""

    max_body_bytes: int = 16 * 1024 * 1024
    max_form_parts: int = 32
    max_prompt_chars: int = 100_000
    max_tokens: int = 2048
    max_context_tokens: int = 16_384
    max_temperature: float = 2.0
    max_top_k: int = 1000
    min_repetition_penalty: float = 0.5
    max_repetition_penalty: float = 2.0
    # OpenAI's bounds of presence_penalty and frequency_penalty, either side of 0.
    max_penalty: float = 2.0
    max_seed: int = 2**63 - 1
    max_stop_strings: int = 8
    max_stop_chars: int = 128
    max_stop_token_ids: int = 64
    max_logit_biases: int = 300
    # OpenAI's bounds of logit_bias, either side of 0, and of top_logprobs.
    max_logit_bias: float = 100.0
    max_top_logprobs: int = 20
    # Answers to one HTTP request, all prompts together: each takes a place.
    max_choices: int = 8
    max_messages: int = 1024
    # Parts of contents, and tool calls, of all messages together. Each costs an object, whatever its text.
    max_message_parts: int = 4096
    max_metadata: int = 16
    max_tools: int = 128
    # Levels of a tool's parameters or of a call's arguments.
    max_json_depth: int = 64
    max_images: int = 4
    # Pixels of one picture as its header states them: 50 megapixels decode to 150 MB of RGB.
    max_image_px: int = 50_000_000
    max_image_frames: int = 1000
    # Qwen2-VL's resize refuses pictures more elongated than this (transformers, `smart_resize`).
    max_image_aspect_ratio: int = 200
    # What a picture is scaled down to before the model sees it: 1,003,520 px are 1,280 visual tokens.
    max_visual_px: int = 1_003_520
    # Pictures of admitted requests of one model, encoded and as patches, in bytes of host memory.
    max_picture_bytes: int = 2 * 1024**3
    # Decoding holds the GIL-free peak of memory: so many pictures are decoded at a time.
    max_concurrent_decodes: int = 2
    # JSON Schemas of structured answers. Within these, none that we tried costs the library more than a second, a
    # hundred megabytes or its stack, see tests/hostile_schemas.py. Depth counts through references.
    max_schema_chars: int = 65_536
    max_schema_depth: int = 48
    max_schema_nodes: int = 2000
    # Of one pattern, constant or name of a property.
    max_schema_string_chars: int = 1000
    max_schema_merged_patterns: int = 4
    max_schema_multiples: int = 10_000
    max_tool_calls: int = 16
    # How long a request waits until its schema is compiled; who compiles cannot be interrupted, so few do at a time.
    schema_timeout_s: float = 5.0
    max_concurrent_compiles: int = 2
    max_waiting_compiles: int = 32
    # Compiled grammars that are kept, per model, and the length of their sources together.
    max_cached_grammars: int = 64
    max_cached_grammar_chars: int = 2 * 1024**2
    # States of the automaton that a grammar's answers build as they go: about 20 for each token of a long string.
    max_grammar_states: int = 250_000
    # How long a sequence waits until it is known which tokens may follow, and how many may find out at a time.
    mask_timeout_s: float = 5.0
    max_concurrent_masks: int = 4
    max_waiting: int = 64
    # 0: as many as the device serves well, see `EngineOptions`.
    max_running: int = 0
    # Prompt tokens and picture patches of one engine step: larger ones are no faster, and hold everybody else back.
    max_step_tokens: int = 4096
    max_step_patches: int = 16_384
    # What prompts may add to the time between two tokens of a running stream.
    max_prefill_delay_s: float = 0.05
    request_deadline_s: float = 120.0
    load_timeout_s: float = 600.0
    stall_limit_s: float = 60.0
    read_timeout_s: float = 30.0
    answer_timeout_s: float = 60.0
    # How often a thread that waits for an answer looks whether its client is still there.
    client_check_interval_s: float = 0.25
    # Least time between two deltas of one streamed answer: each costs a wake-up, a decoding and a write.
    delta_interval_s: float = 0.03
    # A stream with nothing to say sends a comment so often, so that nobody on the way takes it for dead.
    keep_alive_interval_s: float = 5.0
    # Each request is compared with every key.
    max_keys: int = 1000
    # How often the keys file is looked at, so how long a revoked key may still work.
    keys_check_interval_s: float = 1.0
    # How often at most the tokens that keys have used today are written to disk.
    usage_write_interval_s: float = 5.0
    min_disk_free_percent: float = 5.0


_DEFAULTS = Limits()


@dataclass(frozen=True)
class EngineOptions:
    """How the engine uses its device. See the settings of the same names.

    :param cpu_cache_bytes: KV cache of all models where there is no card.
    :param avibe_cache_share: of the memory for KV caches, 0 to 1; Avision gets the rest.
    :param picture_cache_bytes: what the vision tower made of recent pictures.
    """

    device: str = "auto"
    gpu_memory_fraction: float = 0.9
    cpu_cache_bytes: int = 1024**3
    avibe_cache_share: float = 0.7
    picture_cache_bytes: int = 256 * 1024**2
    has_cuda_graphs: bool = True
    compile: Literal["auto", "on", "off"] = "auto"

    # More running at a time make each slower; on a CPU soon too slow for the deadline.
    max_running_cuda: int = 128
    max_running_cpu: int = 16


_ENGINE_DEFAULTS = EngineOptions()


def _split_origins(value: object) -> object:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _check_origins(value: tuple[str, ...]) -> tuple[str, ...]:
    for origin in value:
        if not re.fullmatch(r"https?://[A-Za-z0-9.\-]+(:\d+)?", origin):
            raise ValueError(f"each origin must look like https://host or https://host:port, got {origin!r}")
    return value


def _check_rate(value: str) -> str:
    from limits import parse_many  # flask-limiter's own notation, so that both agree on what is valid

    if value:
        try:
            parse_many(value)
        except ValueError:
            raise ValueError("must be like 10/minute, or several joined by ';', or empty for none") from None
    return value


def _check_token(value: SecretStr) -> SecretStr:
    if 0 < len(value.get_secret_value()) < MIN_OPS_TOKEN_CHARS:
        raise ValueError(f"must be empty or have at least {MIN_OPS_TOKEN_CHARS} characters")
    return value


def _check_device(value: str) -> str:
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", value):
        raise ValueError("must be auto, cpu, cuda or cuda:N")
    return value


def _check_storage(value: str) -> str:
    if not re.match(r"(memory|rediss?|redis\+\w+)://", value):
        raise ValueError("must start with memory://, redis://, rediss:// or redis+sentinel://")
    return value


class Settings(BaseModel):
    """What an operator can set. Built once at start by `load_settings()`; never changes after that.

    Attributes are the variable names in lower case without `AVITO_` (those of the models keep their prefix).
    """

    model_config = ConfigDict(frozen=True, extra="forbid", hide_input_in_errors=True)

    env: Literal["development", "production"] = Field(
        "development", alias="AVITO_ENV", description="`production` refuses embedded demo models"
    )
    allow_demo: bool = Field(
        False, alias="AVITO_ALLOW_DEMO", description="Let production start on embedded demo models"
    )
    host: str = Field("127.0.0.1", alias="AVITO_HOST", min_length=1, description="Address to listen on")
    port: int = Field(8085, alias="AVITO_PORT", ge=1, le=65535, description="TCP port to listen on")
    threads: int = Field(256, alias="AVITO_THREADS", ge=2, le=4096, description="Request threads of the worker")
    rate_limit: Annotated[str, AfterValidator(_check_rate)] = Field(
        "10/minute", alias="AVITO_RATE_LIMIT", description="Per client, or per key, on the generating doors; empty: off"
    )
    rate_limit_storage_uri: Annotated[str, AfterValidator(_check_storage)] = Field(
        "memory://", alias="AVITO_RATE_LIMIT_STORAGE_URI", description="Where the counts live: memory:// or redis://..."
    )
    cors_origins: Annotated[tuple[str, ...], BeforeValidator(_split_origins), AfterValidator(_check_origins)] = Field(
        (), alias="AVITO_CORS_ORIGINS", description="Origins allowed to read answers, joined by commas; empty: none"
    )
    trusted_proxies: int = Field(
        0, alias="AVITO_TRUSTED_PROXIES", ge=0, le=10, description="Proxies in front whose X-Forwarded-For is believed"
    )
    ops_token: Annotated[SecretStr, AfterValidator(_check_token)] = Field(
        SecretStr(""), alias="AVITO_OPS_TOKEN", description="Bearer token of the operator's doors"
    )
    keys_file: str = Field("", alias="AVITO_KEYS_FILE", description="JSON file of callers' keys; empty: no keys needed")
    log_file: str = Field("", alias="AVITO_LOG_FILE", description="Also log to this file; empty: stdout only")
    log_format: Literal["text", "json"] = Field("text", alias="AVITO_LOG_FORMAT", description="Form of a log line")
    log_level: Literal["DEBUG", "INFO", "WARNING", "ERROR"] = Field(
        "INFO", alias="AVITO_LOG_LEVEL", description="Least severe level that is logged"
    )
    device: Annotated[str, AfterValidator(_check_device)] = Field(
        "auto", alias="AVITO_DEVICE", description="auto (CUDA if there is one), cpu, cuda or cuda:N"
    )
    gpu_memory_fraction: float = Field(
        0.90, alias="AVITO_GPU_MEMORY_FRACTION", ge=0.1, le=1.0, description="Share of the card that we may take"
    )
    avibe_cache_share: float = Field(
        _ENGINE_DEFAULTS.avibe_cache_share,
        alias="AVIBE_CACHE_SHARE",
        gt=0,
        lt=1,
        description="Avibe's share of the memory for KV caches, the rest is Avision's; a model alone gets all",
    )
    cpu_cache_bytes: int = Field(
        _ENGINE_DEFAULTS.cpu_cache_bytes,
        alias="AVITO_CPU_CACHE_BYTES",
        ge=16 * 1024**2,
        le=1024**4,
        description="KV cache of all models where there is no card",
    )
    picture_cache_bytes: int = Field(
        _ENGINE_DEFAULTS.picture_cache_bytes,
        alias="AVISION_PICTURE_CACHE_BYTES",
        ge=0,
        le=1024**4,
        description="Device memory for what the vision tower made of recent pictures",
    )
    has_cuda_graphs: bool = Field(
        _ENGINE_DEFAULTS.has_cuda_graphs,
        alias="AVITO_CUDA_GRAPHS",
        description="Capture decode steps as CUDA graphs; off: slower, for finding faults",
    )
    compile: Literal["auto", "on", "off"] = Field(
        _ENGINE_DEFAULTS.compile,
        alias="AVITO_COMPILE",
        description="Compile small operations with torch.compile; auto: on CUDA only",
    )
    compile_cache: str = Field(
        "run/compile",
        alias="AVITO_COMPILE_CACHE",
        description="Folder that keeps what was compiled, so that a restart does not compile again",
    )
    torch_index_url: str = Field(
        "", alias="AVITO_TORCH_INDEX_URL", description="Package index of another build of torch, used by deploy.sh"
    )
    avibe_model_path: str = Field(
        "", alias="AVIBE_MODEL_PATH", description="Snapshot folder or hub cache root; empty: Avibe is not configured"
    )
    avibe_tokenizer_path: str = Field(
        "", alias="AVIBE_TOKENIZER_PATH", description="The same for its tokenizer; empty: the model's folder"
    )
    avibe_dtype: DType = Field("auto", alias="AVIBE_DTYPE", description="auto: float16 on CUDA, float32 on a CPU")
    avision_model_path: str = Field(
        "", alias="AVISION_MODEL_PATH", description="Snapshot folder or hub cache root; empty: Avision not configured"
    )
    avision_dtype: DType = Field("auto", alias="AVISION_DTYPE", description="auto: float16 on CUDA, float32 on a CPU")
    max_queue: int = Field(
        _DEFAULTS.max_waiting, alias="AVITO_MAX_QUEUE", ge=1, le=10_000, description="Requests that may wait, per model"
    )
    max_running: int = Field(
        _DEFAULTS.max_running,
        alias="AVITO_MAX_RUNNING",
        ge=0,
        le=256,
        description="Requests generated at the same time, per model; 0: 128 on CUDA, 16 on a CPU",
    )
    max_prompt_chars: int = Field(
        _DEFAULTS.max_prompt_chars,
        alias="AVITO_MAX_PROMPT_CHARS",
        ge=1,
        le=4_000_000,
        description="Longest prompt in characters",
    )
    max_tokens: int = Field(
        _DEFAULTS.max_tokens,
        alias="AVITO_MAX_TOKENS",
        ge=1,
        le=131_072,
        description="Largest max_tokens that a request may ask for",
    )
    max_context_tokens: int = Field(
        _DEFAULTS.max_context_tokens,
        alias="AVITO_MAX_CONTEXT_TOKENS",
        ge=16,
        le=1_048_576,
        description="Prompt and answer together; the model's own limit if that is smaller",
    )
    max_images: int = Field(
        _DEFAULTS.max_images, alias="AVITO_MAX_IMAGES", ge=1, le=64, description="Pictures in one request"
    )
    max_image_px: int = Field(
        _DEFAULTS.max_image_px,
        alias="AVITO_MAX_IMAGE_PX",
        ge=1024,
        le=400_000_000,
        description="Width x height of one picture, from its header",
    )
    max_picture_bytes: int = Field(
        _DEFAULTS.max_picture_bytes,
        alias="AVITO_MAX_PICTURE_BYTES",
        ge=16 * 1024**2,
        le=1024**4,
        description="Host memory for the pictures of all admitted requests; beyond it queue_full",
    )
    avision_max_px: int = Field(
        _DEFAULTS.max_visual_px,
        alias="AVISION_MAX_PX",
        ge=3136,
        le=16_777_216,
        description="A picture is scaled down to this many pixels for the model (784 px are one visual token)",
    )
    request_deadline_s: float = Field(
        _DEFAULTS.request_deadline_s,
        alias="AVITO_REQUEST_DEADLINE_S",
        gt=0,
        le=3600,
        description="From a request's first byte to its answer",
    )
    grace_s: float = Field(
        135.0, alias="AVITO_GRACE_S", gt=0, le=4000, description="How long a stopping worker goes on answering"
    )
    drain_s: float = Field(
        0.0,
        alias="AVITO_DRAIN_S",
        ge=0,
        le=600,
        description="How long deploy.sh lets balancers look away before a stop",
    )
    read_timeout_s: float = Field(
        _DEFAULTS.read_timeout_s,
        alias="AVITO_READ_TIMEOUT_S",
        gt=0,
        le=600,
        description="Time to send a request, header and body",
    )
    answer_timeout_s: float = Field(
        _DEFAULTS.answer_timeout_s, alias="AVITO_ANSWER_TIMEOUT_S", gt=0, le=600, description="Time to read an answer"
    )
    load_timeout_s: float = Field(
        _DEFAULTS.load_timeout_s,
        alias="AVITO_LOAD_TIMEOUT_S",
        gt=0,
        le=7200,
        description="Longest time to load one model",
    )
    stall_limit_s: float = Field(
        _DEFAULTS.stall_limit_s,
        alias="AVITO_STALL_LIMIT_S",
        gt=0,
        le=3600,
        description="No engine step for so long while work is pending: the worker is replaced",
    )

    @model_validator(mode="after")
    def _fit_together(self) -> Settings:
        mistakes = []
        least_grace_s = self.request_deadline_s + GRACE_MARGIN_S
        if self.grace_s < least_grace_s:
            mistakes.append(
                f"AVITO_GRACE_S={self.grace_s:g}: must be at least AVITO_REQUEST_DEADLINE_S + {GRACE_MARGIN_S:g} "
                f"= {least_grace_s:g}"
            )
        if self.drain_s > 0 and not self.ops_token.get_secret_value():
            mistakes.append(f"AVITO_DRAIN_S={self.drain_s:g}: needs AVITO_OPS_TOKEN, which opens /api/drain")
        if mistakes:
            raise ValueError("; ".join(mistakes))
        return self

    @cached_property
    def limits(self) -> Limits:
        return Limits(
            max_prompt_chars=self.max_prompt_chars,
            max_tokens=self.max_tokens,
            max_context_tokens=self.max_context_tokens,
            max_images=self.max_images,
            max_image_px=self.max_image_px,
            max_picture_bytes=self.max_picture_bytes,
            max_visual_px=self.avision_max_px,
            max_waiting=self.max_queue,
            max_running=self.max_running,
            request_deadline_s=self.request_deadline_s,
            load_timeout_s=self.load_timeout_s,
            stall_limit_s=self.stall_limit_s,
            read_timeout_s=self.read_timeout_s,
            answer_timeout_s=self.answer_timeout_s,
        )

    @cached_property
    def engine(self) -> EngineOptions:
        return EngineOptions(
            device=self.device,
            gpu_memory_fraction=self.gpu_memory_fraction,
            cpu_cache_bytes=self.cpu_cache_bytes,
            avibe_cache_share=self.avibe_cache_share,
            picture_cache_bytes=self.picture_cache_bytes,
            has_cuda_graphs=self.has_cuda_graphs,
            compile=self.compile,
        )


def set_torch_environment(settings: Settings) -> None:
    """What torch reads from the environment when it is imported. An operator's own variables win."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(PROJECT_ROOT / settings.compile_cache))
    # Threads of a CPU that wait for each other by spinning take the time of those they wait for as soon as anything
    # else runs: with one of two cores busy the embedded model made a third of the tokens. Asleep they cost a few
    # percent on an idle machine.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


@dataclass(frozen=True)
class Supervisor:
    """Who started us and wants to be told how we stand: systemd, with a unit of `Type=notify`.

    :param address: of its datagram socket; a leading @ stands for the abstract namespace.
    :param watchdog_s: it restarts us after so long without a sign of progress; None: it does not.
    """

    address: str
    watchdog_s: float | None


def take_supervisor(environ: MutableMapping[str, str] | None = None, pid: int | None = None) -> Supervisor | None:
    """Read systemd's variables and take them out of the environment, so that nothing else speaks in our name.

    :param pid: for whom WATCHDOG_PID must be; default: this process.
    """
    environ = os.environ if environ is None else environ
    address = environ.pop("NOTIFY_SOCKET", "")
    watchdog_usec = environ.pop("WATCHDOG_USEC", "")
    watchdog_pid = environ.pop("WATCHDOG_PID", "")
    if not address.startswith(("/", "@")):
        return None
    is_ours = watchdog_pid in ("", str(os.getpid() if pid is None else pid))
    has_watchdog = is_ours and re.fullmatch(r"0*[1-9]\d*", watchdog_usec)
    return Supervisor(address, int(watchdog_usec) / 1_000_000 if has_watchdog else None)


def _mask_password(value: str) -> str:
    return re.sub(r"//.*@", "//********@", value)


def setting_names() -> dict[str, str]:
    """Variable name -> attribute name, in the order of the class."""
    return {str(field.alias): name for name, field in Settings.model_fields.items()}


def display_value(settings: Settings, attribute: str) -> str:
    """The value as `.env` would spell it; a secret as asterisks."""
    value: Any = getattr(settings, attribute)
    if isinstance(value, SecretStr):
        return "********" if value.get_secret_value() else ""
    if isinstance(value, tuple):
        return ",".join(value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    return _mask_password(str(value))


def load_settings(environ: Mapping[str, str] | None = None, env_file: Path | None = PROJECT_ROOT / ".env") -> Settings:
    """Read `environ` (default: the process's) over `env_file` (default: `.env` of the project; None: no file).

    :raise ConfigError: with one sentence for each mistake: name, value and rule.
    """
    given: dict[str, str] = {}
    sources = [dotenv_values(env_file, interpolate=False) if env_file is not None and env_file.is_file() else {}]
    sources.append(dict(os.environ if environ is None else environ))
    for source in sources:
        given.update({k: v for k, v in source.items() if k.startswith(PREFIXES) and v is not None})

    known = setting_names()
    mistakes = [f"{name}: no such setting" for name in sorted(given) if name not in known]
    given = {name: value for name, value in given.items() if name in known}
    while True:
        try:
            settings = Settings.model_validate(given)
            break
        except ValidationError as error:
            details = error.errors()
            mistakes += [_mistake(detail, given) for detail in details]
            wrong = {str(detail["loc"][0]) for detail in details if detail["loc"]}
            if not wrong:
                raise ConfigError(mistakes) from None
            # Once more without them, because rules between settings are only looked at if each is right by itself.
            given = {name: value for name, value in given.items() if name not in wrong}
    if mistakes:
        raise ConfigError(mistakes)
    return settings


def _mistake(detail: Any, given: Mapping[str, str]) -> str:
    rule: str = detail["msg"].removeprefix("Value error, ")
    if not detail["loc"]:
        return rule
    name = str(detail["loc"][0])
    is_secret = Settings.model_fields[setting_names()[name]].annotation is SecretStr
    shown = "********" if is_secret else _mask_password(given.get(name, ""))
    return f"{name}={shown}: {rule[:1].lower()}{rule[1:]}"


def main(argv: Sequence[str] | None = None) -> int:
    """Print the effective configuration (secrets masked), or one value. Exit code 2 if it has mistakes."""
    parser = argparse.ArgumentParser(prog="python -m config", description=main.__doc__)
    parser.add_argument("--get", metavar="NAME", choices=list(setting_names()), help="print this one value only")
    arguments = parser.parse_args(argv)
    try:
        settings = load_settings()
    except ConfigError as error:
        for mistake in error.mistakes:
            print(mistake, file=sys.stderr)
        return 2
    names = setting_names()
    if arguments.get:
        print(display_value(settings, names[arguments.get]))
        return 0
    for name, attribute in names.items():
        print(f"{name}={display_value(settings, attribute)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
