"""What the annotator itself says of a demo study's images: its reward, how right the colours are, and colourfulness.

    python demo/measure_study.py generated_images/compare_quality/demo     # after python compare_quality.py --demo

The studies score with judges that were trained on the annotator's labels; this is what they were trained to tell. It prints
a row for each folder of images: means with 95 % bootstrap intervals.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import annotator
import numpy as np
import pandas as pd
import tyro
from PIL import Image
from scipy.stats import bootstrap


@dataclass
class Settings:
    study: tyro.conf.Positional[str]
    """the output folder of a study's --demo"""


def main() -> None:
    s = tyro.cli(Settings, description=__doc__)
    rows = []
    for folder in sorted(p for p in Path(s.study).iterdir() if p.is_dir()):
        values = []
        for path in sorted(folder.glob("*.png")):
            with Image.open(path) as image:
                caption = json.loads(image.info["dipo"])["prompt"]
                right = annotator.rightness(image, annotator.scene_of(caption))
                values.append(
                    (annotator.reward(image, caption), np.mean(list(right.values())), annotator.colourfulness(image))
                )
        row = {"images": folder.name, "n": len(values)}
        for name, x in zip(("reward", "rightness", "colourfulness M"), np.array(values).T, strict=True):
            low, high = bootstrap((x,), np.mean, method="percentile", rng=np.random.default_rng(0)).confidence_interval
            row[name] = f"{x.mean():.3f} ({low:.3f} to {high:.3f})"
        rows.append(row)
    print(pd.DataFrame(rows).to_markdown(index=False, disable_numparse=True))


if __name__ == "__main__":
    main()
