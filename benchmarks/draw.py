"""Draw pictures of the docs again, out of benchmarks/results/*.json: nothing is measured here.  Those of the claims are drawn by `publish.py`.

python benchmarks/draw.py            # all; half a minute
python benchmarks/draw.py drift      # that of benchmarks/results/drift.json
"""

import argparse

import bench_drift
import bench_estimators
import bench_loss
import bench_store
import scale_growth
from docs_tables import DOCS, read

#: By result file: the picture in docs/, and what draws it from the rows.
PICTURES = {
    "drift": ("bench_drift", bench_drift.draw),
    "estimators": ("bench_estimators", bench_estimators.draw),
    "bench_loss": ("bench_loss", bench_loss.draw),
    "bench_store": ("bench_store", bench_store.draw),
    "scale": ("bench_scale", scale_growth.draw),
}


def main() -> None:
    """Draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="*", metavar="RESULT", default=[*PICTURES])
    for name in parser.parse_args().results:
        picture, draw = PICTURES[name]
        draw(DOCS / f"{picture}.png", read(name)["rows"])


if __name__ == "__main__":
    main()
