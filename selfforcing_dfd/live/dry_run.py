"""What a stream would need, from the options of the command line: nothing is loaded."""

from __future__ import annotations

import argparse
from dataclasses import replace

from selfforcing_dfd.common import DTYPES, UserError
from selfforcing_dfd.live.play import ask_settings
from selfforcing_dfd.live.ready import ask_saving
from selfforcing_dfd.weights.recipes import asked_by


def dry_run(options: argparse.Namespace) -> str:
    """Memory on a GPU, in lines. Raises UserError without --model: the tiny world fits anywhere."""
    if options.model is None:
        raise UserError("--dry-run counts the memory of Wan on a GPU; add --model DIR")
    from selfforcing_dfd.codecs.small_codec import SmallCodec
    from selfforcing_dfd.streaming.decoders import find_decoder, wants_small
    from selfforcing_dfd.streaming.memory import memory_needs
    from selfforcing_dfd.streaming.wan_memory import memory_lines, streamed_wan

    saving = ask_saving(options)
    recipe = asked_by(options)
    streamed, settled = streamed_wan(
        options.model,
        options.weights,
        DTYPES[options.dtype or "bfloat16"],
        options.size or (None, None),
        recipe,
        saving.lean_vae,
    )
    if wants_small(options.decoder, options.decoder_weights, is_tiny=False):
        small = find_decoder(options.decoder_weights, "wan-vae", dtype=streamed.dtype)
        assert streamed.codec is not None
        streamed = replace(streamed, codec=SmallCodec(small.network.to("meta"), streamed.codec))
    if options.vae_device:
        streamed = replace(streamed, codec=None)
    settings = ask_settings(options, settled)
    rows, columns = streamed.latent_size
    num_frames = settings.sink_frames + settings.window_frames
    dtype = str(streamed.dtype).removeprefix("torch.")
    head = f"{8 * rows}x{8 * columns}, K = {num_frames} latent frames, {dtype}, one stream"
    needs = memory_needs(streamed, settings, saving, options.cuda_graph)
    return "\n".join([head, *memory_lines(needs)])
