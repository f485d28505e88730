"""Examples per second of pythae 0.1.2 in training, for `throughput.py`, which runs this with a Python that has pythae.

python benchmarks/pythae_rate.py '{"models": ["VAE"], "hidden_size": 1000, "batch_size": 128, "seconds": 5,
    "repeats": 5, "threads": 2, "path": "highest", "device": "cpu"}'

Timed is `train_step` of pythae's own trainer, an epoch: its model, its losses, its backward pass and its Adam. Batches
are gathered, shuffled, from a tensor of floats in memory; pythae's own loader would collate them example by example in
Python, so a user finds pythae slower than this. Encoder and decoder are those of `ddvi.networks` at the paper's
settings (two layers, leaky ReLU, dropout 0.2), the flow has the layers and widths of ours, the discriminator two layers
as wide as the encoder's; the prior is the standard Gaussian, pythae's only one. Nothing of ddvi is imported.
"""

# pyright: reportMissingImports=false
# pythae is no dependency of ddvi: it is only there where somebody wants to compare.

from __future__ import annotations

import json
import logging
import math
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import Any

os.environ["TQDM_DISABLE"] = "1"  # pythae draws a bar a step

import torch
from torch import Tensor, nn

IMAGE, PIXELS, LATENT = (1, 28, 28), 784, 2


def layers(size: int, width: int) -> list[nn.Module]:
    """Two of the paper's, with dropout."""
    hidden: list[nn.Module] = []
    for inputs in (size, width):
        hidden += [nn.Linear(inputs, width), nn.LeakyReLU(inplace=True), nn.Dropout(0.2)]
    return hidden


class Batches:
    """Batches of a tensor in memory, reshuffled at each pass; stands in for a loader."""

    def __init__(self, images: Tensor, batch_size: int) -> None:
        self.dataset = images
        self.batch_size = batch_size

    def __len__(self) -> int:
        return len(self.dataset) // self.batch_size

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        for rows in torch.randperm(len(self.dataset)).split(self.batch_size)[: len(self)]:
            yield {"data": self.dataset[rows]}


def trainer(name: str, images: Tensor, folder: str, request: dict[str, Any]) -> Any:
    """pythae's trainer of one of its models; it makes a folder for its results."""
    from pythae import models, trainers
    from pythae.data.datasets import BaseDataset
    from pythae.models.base.base_utils import ModelOutput
    from pythae.models.nn import BaseDecoder, BaseDiscriminator, BaseEncoder

    width = request["hidden_size"]

    class Encoder(BaseEncoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*layers(PIXELS, width))
            self.mean, self.log_variance = nn.Linear(width, LATENT), nn.Linear(width, LATENT)

        def forward(self, x: Tensor) -> ModelOutput:
            features = self.layers(x.flatten(1))
            return ModelOutput(embedding=self.mean(features), log_covariance=self.log_variance(features))

    class Decoder(BaseDecoder):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*layers(LATENT, width), nn.Linear(width, PIXELS), nn.Sigmoid())

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(reconstruction=self.layers(z).unflatten(-1, IMAGE))

    class Discriminator(BaseDiscriminator):
        def __init__(self) -> None:
            super().__init__()
            hidden = [nn.Linear(LATENT, width), nn.LeakyReLU(), nn.Linear(width, width), nn.LeakyReLU()]
            self.layers = nn.Sequential(*hidden, nn.Linear(width, 1), nn.Sigmoid())

        def forward(self, z: Tensor) -> ModelOutput:
            return ModelOutput(embedding=self.layers(z))

    common: dict[str, Any] = {"input_dim": IMAGE, "latent_dim": LATENT, "reconstruction_loss": "bce"}
    match name:
        case "VAE":
            model: Any = models.VAE(models.VAEConfig(**common), Encoder(), Decoder())
        case "VAE_IAF":
            flow = {"n_made_blocks": 4, "n_hidden_in_made": 2, "hidden_size": 64}
            model = models.VAE_IAF(models.VAE_IAF_Config(**common, **flow), Encoder(), Decoder())
        case "Adversarial_AE":
            config = models.Adversarial_AE_Config(**common, deterministic_posterior=True)
            model = models.Adversarial_AE(config, Encoder(), Decoder(), Discriminator())
        case other:
            raise ValueError(other)
    adversarial = name == "Adversarial_AE"
    options = {
        "output_dir": folder,
        "per_device_train_batch_size": request["batch_size"],
        "no_cuda": request["device"] != "cuda",
    }
    rates = ("autoencoder_learning_rate", "discriminator_learning_rate") if adversarial else ("learning_rate",)
    options |= dict.fromkeys(rates, 1e-4)
    make_config = trainers.AdversarialTrainerConfig if adversarial else trainers.BaseTrainerConfig
    make = trainers.AdversarialTrainer if adversarial else trainers.BaseTrainer
    made = make(model, BaseDataset(images, torch.zeros(len(images))), training_config=make_config(**options))
    made.prepare_training()
    return made


def rates(name: str, request: dict[str, Any]) -> list[float]:
    """Examples per second of each repeat, after a warm-up."""
    batch_size = request["batch_size"]
    images = torch.randint(0, 2, (60_000, *IMAGE), dtype=torch.uint8).float().to(request["device"])
    with tempfile.TemporaryDirectory() as folder:
        made = trainer(name, images[: 2 * batch_size], folder, request)

    def epoch(examples: int) -> float:
        made.train_loader = Batches(images[:examples], batch_size)
        started = time.perf_counter()
        made.train_step(1)  # reads the loss at each step, which waits for the device
        return examples / (time.perf_counter() - started)

    epoch(2 * batch_size)
    warm = epoch(2 * batch_size)
    steps = math.ceil(warm * request["seconds"] / request["repeats"] / batch_size)
    examples = batch_size * max(1, min(steps, len(images) // batch_size))
    epoch(examples)
    return [epoch(examples) for _ in range(request["repeats"])]


def main() -> None:
    from importlib.metadata import version

    logging.disable(logging.CRITICAL)
    request = json.loads(sys.argv[1])
    torch.set_num_threads(request["threads"])
    torch.set_float32_matmul_precision(request["path"])
    measured = {name: rates(name, request) for name in request["models"]}
    print(json.dumps({"pythae": version("pythae"), "torch": torch.__version__, "rates": measured}))


if __name__ == "__main__":
    main()
