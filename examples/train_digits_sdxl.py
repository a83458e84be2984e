"""Trains a small SDXL of diffusers' real classes on digits in six colours: "a photo of the digit seven in red".

    python examples/train_digits_sdxl.py OUTPUT

Within 20 minutes on two cores, it trains a VAE, then the UNet and its text encoders on the VAE's latents. It saves
a diffusers pipeline in half precision, which a judge then scores. Checkpoints are written beside OUTPUT about every
minute: after Ctrl-C or a crash, the same command resumes from there, and ends with the same weights.

It is one file of over 400 lines on purpose: an example is read, copied and run by itself.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import tokenizers
import torch
import transformers
from diffusers.training_utils import EMAModel, compute_snr
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from torch import nn

from digits import COLOURS, DIGITS, SIZE, Drawings, Judge, drawings, paint, prompt

#: For the VAE: batch size, peak learning rate, and weight of the KL divergence of its latents.
VAE_BATCH, VAE_RATE, VAE_DIVERGENCE = 64, 2e-3, 3e-5

#: For the UNet and the text encoders: batch size, and peak learning rate.
BATCH, RATE = 64, 1e-3

#: Number of steps over which the learning rate rises.
WARM_UP = 100

#: Share of prompts that are replaced by zeros, as in SDXL, to train the UNet for guidance.
NO_PROMPT = 0.12

#: Limit of the signal-to-noise ratio in the loss weights ("Min-SNR", Hang et al., 2023).
SNR_LIMIT = 5.0

#: Decay of the exponential moving average of the weights, which is saved.
MEAN_DECAY = 0.998

#: Number of steps between two checkpoints.
KEEP_EVERY = 250

#: Number of tokens in a prompt, and width of a text encoder.
TOKENS, TEXT = 16, 32

#: For the pictures that are judged: denoising steps, guidance, and batch size.
JUDGED_STEPS, JUDGED_GUIDANCE, JUDGED_AT_ONCE = 20, 5.0, 60

EXIT_INTERRUPTED = 130

stderr = Console(stderr=True, highlight=False)


# --- the model ----------------------------------------------------------------------------------------------


def make_tokenizer() -> transformers.CLIPTokenizer:
    """A byte-pair encoding whose tokens are the prompts' words, and letters for all others."""
    blank = transformers.CLIPTokenizer()
    special = [str(blank.bos_token), str(blank.eos_token)]
    learner = tokenizers.Tokenizer(tokenizers.models.BPE(end_of_word_suffix="</w>", unk_token=special[1]))
    learner.normalizer = blank.backend_tokenizer.normalizer
    learner.pre_tokenizer = blank.backend_tokenizer.pre_tokenizer
    letters = [chr(code) for code in range(ord("!"), ord("~") + 1)]
    prompts = [prompt(digit, colour) for digit in range(len(DIGITS)) for colour in COLOURS]
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400, special_tokens=special, end_of_word_suffix="</w>", show_progress=False
    )
    learner.train_from_iterator([*prompts, *letters], trainer)
    model = json.loads(learner.to_str())["model"]
    merges = [tuple(merge) for merge in model["merges"]]
    return transformers.CLIPTokenizer(model["vocab"], merges, model_max_length=TOKENS)


def make_pipeline() -> diffusers.StableDiffusionXLPipeline:
    """The pipeline, with untrained weights."""
    tokenizer = make_tokenizer()
    text = transformers.CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=TEXT,
        intermediate_size=2 * TEXT,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=TOKENS,
        projection_dim=TEXT,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(16, 24, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=SIZE,
        force_upcast=False,
    )
    unet = diffusers.UNet2DConditionModel(
        sample_size=SIZE // 4,
        block_out_channels=(32, 64, 96),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=(2, 4, 8),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=2 * TEXT,
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT + 6 * 8,
        norm_num_groups=8,
    )
    # More noise than with SDXL's 0.012, so that the last step leaves nothing of the picture, as in initial noise.
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.02,
        prediction_type="v_prediction",
        timestep_spacing="trailing",
    )
    return diffusers.StableDiffusionXLPipeline(
        vae=vae,
        text_encoder=transformers.CLIPTextModel(text),
        text_encoder_2=transformers.CLIPTextModelWithProjection(text),
        tokenizer=tokenizer,
        tokenizer_2=tokenizer,
        unet=unet,
        scheduler=scheduler,
        add_watermarker=False,
    )


# --- learning -----------------------------------------------------------------------------------------------


class Lesson:
    """Training of some modules with one optimizer, which can be interrupted and resumed.

    Args:
        checkpoint: the file with the state; resumed from if it exists.
        modules: the modules to train.
        loss: computes the loss of a step, with random numbers from the generator.
    """

    def __init__(
        self,
        checkpoint: Path,
        modules: nn.ModuleDict,
        rate: float,
        steps: int,
        seed: int,
        loss: Callable[[torch.Generator], torch.Tensor],
    ) -> None:
        self._checkpoint, self._modules, self._loss = checkpoint, modules, loss
        self._seed, self.steps, self.step = seed, steps, 0
        self._parameters = list(modules.parameters())
        self._optimizer = torch.optim.AdamW(self._parameters, rate, betas=(0.9, 0.99), weight_decay=0.01)
        self._rates = torch.optim.lr_scheduler.LambdaLR(self._optimizer, self._rate)
        self._mean = EMAModel(self._parameters, decay=MEAN_DECAY, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
        self._chance = torch.Generator().manual_seed(seed)
        if checkpoint.exists():
            self._load(torch.load(checkpoint, weights_only=True))

    def _rate(self, step: int) -> float:
        """Factor of the learning rate: a linear warm-up, then half a cosine down."""
        return min(1.0, (step + 1) / WARM_UP) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / self.steps)))

    def learn(self, advance: Callable[[int, float], None]) -> None:
        """Trains to the last step. Then the modules' weights are their moving averages."""
        self._modules.train()
        smooth = math.nan
        while self.step < self.steps:
            loss = self._loss(self._chance)
            loss.backward()
            nn.utils.clip_grad_norm_(self._parameters, 1.0)
            self._optimizer.step()
            self._optimizer.zero_grad()
            self._rates.step()
            self._mean.step(self._parameters)
            self.step += 1
            smooth = loss.item() if math.isnan(smooth) else 0.98 * smooth + 0.02 * loss.item()
            advance(self.step, smooth)
            if self.step % KEEP_EVERY == 0 or self.step == self.steps:
                self._keep()
        self._mean.copy_to(self._parameters)
        self._modules.eval().requires_grad_(False)

    def _keep(self) -> None:
        state = {
            "seed": self._seed,
            "steps": self.steps,
            "step": self.step,
            "modules": self._modules.state_dict(),
            "optimizer": self._optimizer.state_dict(),
            "rates": self._rates.state_dict(),
            "mean": self._mean.state_dict(),
            "chance": self._chance.get_state(),
        }
        partial = self._checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(self._checkpoint)

    def _load(self, state: dict[str, Any]) -> None:
        if (state["steps"], state["seed"]) != (self.steps, self._seed):
            raise ValueError(
                f"{self._checkpoint} is from a training with other steps or another seed: "
                "remove it, or use the same values"
            )
        self.step = state["step"]
        self._modules.load_state_dict(state["modules"])
        self._optimizer.load_state_dict(state["optimizer"])
        self._rates.load_state_dict(state["rates"])
        self._mean.load_state_dict(state["mean"])
        self._chance.set_state(state["chance"])


def vae_lesson(vae: diffusers.AutoencoderKL, seen: Drawings, checkpoint: Path, steps: int, seed: int) -> Lesson:
    """Trains the VAE: from pictures to latents, and back."""
    palette = torch.tensor(list(COLOURS.values()))

    def loss(chance: torch.Generator) -> torch.Tensor:
        which = torch.randint(len(seen.ink), (VAE_BATCH,), generator=chance)
        colours = torch.randint(len(palette), (VAE_BATCH,), generator=chance)
        pictures = paint(seen.ink[which], palette[colours]) * 2 - 1
        latents = vae.encode(pictures).latent_dist
        noise = torch.randn(latents.mean.shape, generator=chance)
        found = vae.decode(latents.mean + latents.std * noise).sample
        distance = (found - pictures).square().mean() + 0.5 * (found - pictures).abs().mean()
        return distance + VAE_DIVERGENCE * latents.kl().mean()

    return Lesson(checkpoint, nn.ModuleDict({"vae": vae}), VAE_RATE, steps, seed, loss)


@torch.no_grad()
def encode_all(vae: diffusers.AutoencoderKL, seen: Drawings) -> torch.Tensor:
    """Means of the latents `[colours, n, 4, height, width]`, scaled to a deviation of 1; sets the VAE's factor."""

    def encode(ink: torch.Tensor, colour: tuple[float, ...]) -> torch.Tensor:
        return vae.encode(paint(ink, torch.tensor([colour]).expand(len(ink), 3)) * 2 - 1).latent_dist.mean

    painted = [torch.cat([encode(ink, colour) for ink in seen.ink.split(100)]) for colour in COLOURS.values()]
    latents = torch.stack(painted)
    vae.register_to_config(scaling_factor=round(1 / latents.std().item(), 4))
    return latents * vae.config.scaling_factor


def unet_lesson(
    pipeline: diffusers.StableDiffusionXLPipeline,
    latents: torch.Tensor,
    seen: Drawings,
    checkpoint: Path,
    steps: int,
    seed: int,
) -> Lesson:
    """Trains the UNet and the text encoders: from noise and prompts to latents."""
    unet, scheduler = pipeline.unet, pipeline.scheduler
    modules = nn.ModuleDict(
        {"unet": unet, "text_encoder": pipeline.text_encoder, "text_encoder_2": pipeline.text_encoder_2}
    )
    colours = list(COLOURS)
    prompts = [prompt(digit, colour) for digit in range(len(DIGITS)) for colour in colours]
    tokens = pipeline.tokenizer(prompts, padding="max_length", max_length=TOKENS, return_tensors="pt").input_ids
    weights = compute_snr(scheduler, torch.arange(len(scheduler.alphas_cumprod)))
    weights = weights.clamp(max=SNR_LIMIT) / (weights + 1)
    amounts = scheduler.alphas_cumprod
    sizes = torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE]).expand(BATCH, 6)

    def loss(chance: torch.Generator) -> torch.Tensor:
        which = torch.randint(len(seen.digits), (BATCH,), generator=chance)
        colour = torch.randint(len(colours), (BATCH,), generator=chance)
        times = torch.randint(len(amounts), (BATCH,), generator=chance)
        noise = torch.randn((BATCH, *latents.shape[2:]), generator=chance)
        prompted = (torch.rand(BATCH, generator=chance) >= NO_PROMPT).float()
        clean = latents[colour, which]
        amount = amounts[times][:, None, None, None]
        signal, noisiness = amount**0.5, (1 - amount) ** 0.5
        ids = tokens[seen.digits[which] * len(colours) + colour]
        first = pipeline.text_encoder(ids, output_hidden_states=True)
        second = pipeline.text_encoder_2(ids, output_hidden_states=True)
        states = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], -1)
        velocity = unet(
            signal * clean + noisiness * noise,
            times,
            states * prompted[:, None, None],
            added_cond_kwargs={"text_embeds": second.text_embeds * prompted[:, None], "time_ids": sizes},
        ).sample
        error = (velocity - (signal * noise - noisiness * clean)).square().mean((1, 2, 3))
        return (weights[times] * error).mean()

    return Lesson(checkpoint, modules, RATE, steps, seed, loss)


# --- the whole ----------------------------------------------------------------------------------------------


def train(output: Path, vae_steps: int, steps: int, seed: int, progress: Progress) -> None:
    """Trains the pipeline and saves it as `output`; checkpoints are in a directory beside it."""
    partial = output.with_name(f".{output.name}.partial")
    partial.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    pipeline = make_pipeline()
    seen, _ = drawings()
    vae = vae_lesson(pipeline.vae, seen, partial / "vae.pt", vae_steps, seed)
    vae.learn(_bar(progress, "VAE", vae))
    latents = encode_all(pipeline.vae, seen)
    unet = unet_lesson(pipeline, latents, seen, partial / "unet.pt", steps, seed + 1)
    unet.learn(_bar(progress, "UNet and text encoders", unet))
    with tempfile.TemporaryDirectory(dir=partial) as directory:
        saved = Path(directory) / output.name
        pipeline.to(torch.float16).save_pretrained(saved)
        saved.rename(output)
    shutil.rmtree(partial)


def _bar(progress: Progress, name: str, lesson: Lesson) -> Callable[[int, float], None]:
    task = progress.add_task(name, total=lesson.steps, completed=lesson.step, loss="")

    def advance(step: int, loss: float) -> None:
        progress.update(task, completed=step, loss=f"loss {loss:.4f}")
        if not stderr.is_terminal and step % KEEP_EVERY == 0:
            stderr.print(f"{name}: step {step} of {lesson.steps}, loss {loss:.4f}")

    return advance


def judge(path: Path, each: int, seed: int, progress: Progress) -> dict[str, float]:
    """Accuracies over `each` pictures of every digit in every colour. Raises ValueError if it is not a pipeline."""
    if not (path / "model_index.json").is_file():
        raise ValueError(f"{path} exists and is not a pipeline: remove it, or name another directory")
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(
        str(path), dtype=torch.float32, add_watermarker=False
    )
    pipeline.set_progress_bar_config(disable=True)
    wanted = [(digit, colour) for digit in range(len(DIGITS)) for colour in COLOURS] * each
    chance = torch.Generator().manual_seed(seed)
    _, held_out = drawings()
    critic = Judge(held_out)
    task = progress.add_task("judging", total=len(wanted), loss="")
    digits_right = colours_right = 0
    for begin in range(0, len(wanted), JUDGED_AT_ONCE):
        some = wanted[begin : begin + JUDGED_AT_ONCE]
        pictures = pipeline(
            [prompt(*each) for each in some],
            num_inference_steps=JUDGED_STEPS,
            guidance_scale=JUDGED_GUIDANCE,
            generator=chance,
            output_type="pt",
        ).images
        digits_right += sum(found == digit for found, (digit, _) in zip(critic.digits(pictures), some, strict=True))
        colours_right += sum(found == name for found, (_, name) in zip(critic.colours(pictures), some, strict=True))
        progress.update(task, advance=len(some))
    return {"digit_accuracy": digits_right / len(wanted), "colour_accuracy": colours_right / len(wanted)}


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} {task.fields[loss]}"),
    )
    with Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=stderr) as progress:
        yield progress


def _count(text: str) -> int:
    number = int(text)
    if number < 1:
        raise ValueError
    return number


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="directory of the pipeline; if it exists, it is only judged")
    parser.add_argument(
        "--vae-steps", type=_count, default=400, metavar="N", help="training steps of the VAE (%(default)s)"
    )
    parser.add_argument(
        "--steps", type=_count, default=3000, metavar="N", help="training steps of the UNet (%(default)s)"
    )
    parser.add_argument(
        "--judged",
        type=_count,
        default=10,
        metavar="N",
        help="number of pictures to judge for each digit and colour (%(default)s)",
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="the same seed and threads give the same weights (%(default)s)"
    )
    parser.add_argument("--threads", type=_count, help="CPU threads; default: one per core")
    parser.add_argument("--json", action="store_true", help="print the result as one JSON object on one line")
    options = parser.parse_args(arguments)
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()
    if options.threads:
        torch.set_num_threads(options.threads)
    began = time.perf_counter()
    try:
        with _progress() as progress:
            if not options.output.exists():
                train(options.output, options.vae_steps, options.steps, options.seed, progress)
            train_s = time.perf_counter() - began
            result = judge(options.output, options.judged, options.seed, progress)
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command resumes from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    result |= {"train_s": train_s}
    print(json.dumps(result) if options.json else "\n".join(f"{k}: {v:.3f}" for k, v in result.items()), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
