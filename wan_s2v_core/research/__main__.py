"""The command line of what is research: `python -m wan_s2v_core.research split CHECKPOINT OUT`."""

import argparse
import json
import sys
from functools import partial

from ..cli import FINE, Parser, best_device, common_flags, main, parse_size, show_step, whole


def run_split(options: argparse.Namespace) -> int:
    from ..config import SamplingConfig, VideoConfig
    from .calibrate import SplitRequest, split_checkpoint

    request = SplitRequest(
        checkpoint=options.checkpoint,
        out=options.out,
        experts=options.experts,
        audio=options.audio,
        image=options.image,
        prompt=options.prompt,
        device=options.device or best_device(),
        precision=options.precision,
    )
    video = VideoConfig(max_area=parse_size(options.size), clip_frames=options.infer_frames, clips=1)
    tell = None if options.json else lambda step, _: show_step(1, 1, step)
    report = split_checkpoint(request, video, SamplingConfig(steps=options.steps), tell)
    if options.json:
        print(json.dumps(report.to_dict()))
    else:
        print(file=sys.stderr)
        print(f"{report.path}: {request.experts} experts, from {report.tokens} tokens of each feed-forward")
        print(report.split)
    return FINE


def make_parser() -> argparse.ArgumentParser:
    parser = Parser(prog="python -m wan_s2v_core.research", description="Wan2.2-S2V: what is not on the main way.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    split = commands.add_parser(
        "split",
        parents=[common_flags()],
        help="make a checkpoint with experts of a dense one, by what its feed-forwards do on a short input",
    )
    split.set_defaults(run=run_split)
    add = split.add_argument
    add("checkpoint", help="folder of Wan2.2-S2V-14B, or one in its layout")
    add("out", help="folder to make; it takes as much disk as the DiT, the other networks are links")
    add("--experts", type=whole, default=8, help="into so many (default %(default)s)")
    add("--audio", required=True, help="recording, of which the first clip is used")
    add("--image", required=True, help="reference picture")
    add("--prompt", default="", help="what is to be seen")
    add("--steps", "--sample_steps", type=whole, default=6, help="steps over all noise levels (default %(default)s)")
    add("--size", default="832*480", help="bound of the area; the picture gives the aspect (default %(default)s)")
    add("--infer_frames", type=whole, default=80, help="frames of the clip, a multiple of 4 (default %(default)s)")
    add("--device", help="cuda if there is a card, else cpu")
    add("--precision", default="auto", help="of the run, as for generate (default %(default)s)")
    return parser


run = partial(main, parser=make_parser)
"""Arguments -> exit code."""

if __name__ == "__main__":
    sys.exit(run())
