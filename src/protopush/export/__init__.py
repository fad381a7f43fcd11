"""A run as one ONNX file, which needs neither PyTorch nor protopush to be used."""

from protopush.export.exporting import Exported, ParityError, export_onnx

__all__ = ["Exported", "ParityError", "export_onnx"]
