"""Names for pictures, by an adapter that `complora train` saved: `python examples/predict.py ADAPTER IMAGE...`.

The same on the command line: complora predict ADAPTER IMAGE...
"""

import sys

import complora_kernels as ck


def main(adapter: str, *images: str) -> list[str]:
    """Print the three most probable classes of each picture, and return the most probable one."""
    classifier = ck.load_classifier(adapter)
    found = classifier(images, top=3)
    for image, ranking in zip(images, found, strict=True):
        print(image, *(f"{name} {share:.0%}" for name, share in zip(*ranking, strict=True)), sep="  ")
    return [ranking.names[0] for ranking in found]


if __name__ == "__main__":
    main(*sys.argv[1:])
