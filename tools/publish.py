#!/usr/bin/env python
"""Publish a trained model as an entry of a model zoo.

    python tools/publish.py output/mine --to zoo --license cc-by-4.0

A zoo is a folder, which any web server can serve. The entry has the weights of the teacher as
safetensors, the config, class names, results, command line, versions, and a model card with
pictures of detections in test images. Optimizer, student and logs are not published. Paths that
lead out of the working folder are reduced to their last part, so that no private paths are
published.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import locreweight.modeling  # noqa: F401  (registers the model)
from locreweight.command_line import HelpFormatter, count_of, reports_errors
from locreweight.publish import PublishOptions, publish, read_trained_model
from locreweight.visualization.model_card import PICTURE


@reports_errors
def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=HelpFormatter,
    )
    parser.add_argument("run", type=Path, help="OUTPUT_DIR of the run")
    parser.add_argument("--to", type=Path, required=True, help="folder of the zoo")
    parser.add_argument("--name", help="name of the model. Default: name of the run's folder")
    parser.add_argument(
        "--last", action="store_true", help="publish the last teacher instead of the best"
    )
    parser.add_argument(
        "--license", default="", help="license of the weights as SPDX identifier, such as cc-by-4.0"
    )
    parser.add_argument("--description", default="", help="a paragraph for the model card")
    parser.add_argument(
        "--pkl", action="store_true", help="also export the weights for plain Detectron2"
    )
    parser.add_argument(
        "--pictures", type=int, default=6, help="number of images in the model card"
    )
    parser.add_argument(
        "--images", default="", help="folder of these images. Default: the test set"
    )
    parser.add_argument(
        "--replace", action="store_true", help="replace an existing entry of this name"
    )
    args = parser.parse_args()
    options = PublishOptions(
        name=args.name or args.run.resolve().name,
        license=args.license,
        description=args.description,
        pickle=args.pkl,
        pictures=args.pictures,
        images=args.images,
        replace=args.replace,
    )
    entry = publish(read_trained_model(args.run, last=args.last), args.to, options)
    print(f"{args.to / entry.name}: {entry.weights}, {count_of(len(entry.metrics), 'metric')}")
    if not entry.metrics:
        print("note: the run was not evaluated at this checkpoint, as the model card states")
    if not entry.license:
        print("note: without a license nobody may use the weights; set one with --license")
    if options.pictures:
        print(f"note: {PICTURE} shows images of the data; make sure that they may be published")


if __name__ == "__main__":
    main()
