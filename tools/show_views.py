#!/usr/bin/env python
"""Check the augmentations before training: draw the weak and the strong view of some images.

    python tools/show_views.py --config-file configs/quickstart.yaml --output views.jpg

Each row is one image: the weak view (for the teacher) and the strong view (for the student). Both
show the ground truth, dashed and with class names, and the student's proposals. Proposals are
predicted in the strong view and projected to the weak view, with the same color and number in both.
A box must enclose the same image content in both views; if it does not, an augmentation or its
matrix is wrong. Without --weights the student is initialized randomly and proposals are arbitrary,
but they must enclose the same content, too.
"""

from __future__ import annotations

from locreweight.command_line import (
    ConfigArgumentParser,
    add_weights_arguments,
    check_outputs,
    count_of,
    non_negative,
    positive,
    reports_errors,
)
from locreweight.config import load_config
from locreweight.engine.inference import INPUT_HELP, picture_file
from locreweight.engine.predictor import load_student
from locreweight.visualization.drawing import save_picture
from locreweight.visualization.views import draw_view_table, select_records


@reports_errors
def main() -> None:
    parser = ConfigArgumentParser(description=__doc__)
    parser.add_argument("--config-file", required=True, help="config of the training")
    parser.add_argument(
        "--method", default="", metavar="NAME", help="a method of configs/methods, or a file"
    )
    add_weights_arguments(
        parser,
        required=False,
        default="",
        help="a checkpoint or OUTPUT_DIR whose student proposes boxes. Default: a random student",
    )
    parser.add_argument(
        "--input", nargs="+", default=[], help=f"{INPUT_HELP}; default: images of DATASETS.TRAIN"
    )
    parser.add_argument(
        "--output", type=picture_file, required=True, help="the picture, .jpg or .png"
    )
    parser.add_argument("--count", type=positive, default=4, help="maximum number of images")
    parser.add_argument(
        "--proposals", type=non_negative, default=5, help="number of proposals per image"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the augmentations")
    args = parser.parse_args()
    check_outputs(args.output)
    cfg = load_config(args.config_file, args.opts, args.method)
    records = select_records(cfg, args.input, args.count)
    student = load_student(cfg, args.weights, last=args.last)
    picture = draw_view_table(cfg, records, student, args.proposals, args.seed)
    save_picture(picture, args.output)
    print(f"{count_of(len(records), 'image')}: {args.output}")


if __name__ == "__main__":
    main()
