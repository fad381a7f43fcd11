"""A prediction and its reasons, without PyTorch: ``python examples/onnx_predict.py model.onnx photo.jpg``.

Needs onnxruntime, numpy and Pillow. The file says itself how pictures become its input, and what its prototypes are.
"""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def pixels_of(path: str, how: dict) -> np.ndarray:
    """The picture, resized and cropped, as a file that takes ``pixels`` wants it: (1, height, width, 3) uint8."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):  # 16 bits: Pillow alone would clip them to white
        values = np.asarray(image, dtype=np.float64) / 257
        image = Image.fromarray(np.rint(values.clip(0, 255)).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image, (height, width) = image.convert("RGB"), how["size"]
    scale = max(width / image.width, height / image.height) / how["crop_pct"]
    resized = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
    if resized != image.size:
        image = image.resize(resized, Image.Resampling[how["interpolation"].upper()])
    x, y = (resized[0] - width) // 2, (resized[1] - height) // 2
    return np.array(image.crop((x, y, x + width, y + height)))[None]


def prepare(path: str, how: dict) -> np.ndarray:
    """The picture as a file that takes ``images`` wants it: (1, 3, height, width) float32."""
    pixels = pixels_of(path, how).astype(np.float32) / 255
    normalised = (pixels - np.float32(how["mean"])) / np.float32(how["std"])
    return normalised.transpose(0, 3, 1, 2)


if __name__ == "__main__":
    session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
    about = {key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()}
    name = session.get_inputs()[0].name  # what it was exported to take
    given = {"images": prepare, "pixels": pixels_of}[name](sys.argv[2], about["preprocessing"])
    logits, similarities, cells = session.run(["logits", "similarities", "best_cells"], {name: given})
    odds = np.exp(logits[0] - logits[0].max())
    c = int(odds.argmax())
    print(f"{about['class_names'][c]}: {odds[c] / odds.sum():.1%}")
    contributions = np.array(about["weights"][c]) * similarities[0, c]  # with the bias they add up to the logit
    anchors = [anchor for anchor in about["anchors"] if anchor["class_index"] == c]
    for anchor in sorted(anchors, key=lambda anchor: -contributions[anchor["prototype"]])[:3]:
        k = anchor["prototype"]
        box = about["regions"]["boxes"][int(cells[0, c, k])]  # in pixels of the model's input
        print(f"  {contributions[k]:+.2f}: {box} is similar ({similarities[0, c, k]:.2f}) to", end=" ")
        print(f"prototype {k}, {anchor['file']} at {anchor['box']}")
