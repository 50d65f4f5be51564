"""Command `images`: what an image-to-video model of Wan2.1 sees of clips' first video frames."""

from __future__ import annotations

import argparse
from pathlib import Path

from selfforcing_dfd.cli.options import DEVICE_HELP, DTYPE_NAMES, Run, positive


def images(parser: argparse.ArgumentParser) -> Run:
    """Store with every clip its first video frame as Wan2.1-I2V sees it."""
    parser.add_argument(
        "folder",
        type=Path,
        metavar="FOLDER",
        help="shards with their index.json; replaced as a whole",
    )
    parser.add_argument(
        "--model",
        type=Path,
        required=True,
        metavar="DIR",
        help="diffusers folder of Wan2.1-I2V: its vae, image_encoder and image_processor",
    )
    parser.add_argument(
        "--batch", type=positive, default=1, metavar="N", help="clips at once (default: 1)"
    )
    parser.add_argument("--device", default="auto", help=DEVICE_HELP)
    parser.add_argument(
        "--dtype",
        choices=DTYPE_NAMES,
        default="float32",
        help="of the VAE, as the clips were packed (default: %(default)s)",
    )

    def run(args: argparse.Namespace) -> None:
        from selfforcing_dfd.data.encoders import load_picture_encoder
        from selfforcing_dfd.data.pictures import store_pictures

        encoder = load_picture_encoder(args.model, args.device, args.dtype, args.folder)
        summary = store_pictures(
            args.folder, encoder.of_clips, fingerprint=encoder.fingerprint, batch_size=args.batch
        )
        print(f"{summary.folder}: {summary.num_samples} samples now have their picture")

    return run
