"""The command line: `micelab demo | train | convert | evaluate | explain | data`."""

from __future__ import annotations

import typer

app = typer.Typer(no_args_is_help=True, add_completion=False)


@app.callback()
def _root() -> None:
    pass


@app.command()
def train(
    dataset: str = "digits",
    network: str | None = None,
    kind: str | None = None,
    width: int | None = None,
    activation: str = "quant_clip",
    levels: int = 8,
    theta: float = 4.0,
    epochs: int = 60,
    batch_size: int = 128,
    lr: float = 0.1,
    augment: str = "standard",
    seed: int = 0,
    precision: str = "auto",
    compile: bool = False,
    out: str = "data/runs/latest",
    data: str | None = None,
    resume: bool = False,
) -> None:
    import logging

    from micelab.train import TrainConfig, default_precision
    from micelab.train import train as run

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    config = TrainConfig(
        dataset=dataset,
        network=network or ("small_cnn" if dataset == "digits" else "resnet20"),
        kind=kind,
        width=width,
        activation=activation,
        levels=levels if activation == "quant_clip" else None,
        theta=theta,
        epochs=epochs,
        batch_size=batch_size,
        lr=lr,
        augment=augment,
        seed=seed,
        precision=default_precision() if precision == "auto" else precision,
        compile=compile,
    )
    run(config, out, resume=resume, folder=data)


def main() -> None:
    app()
