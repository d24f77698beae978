"""Read and write files: weights, images, and purified models with their records."""

from .architecture import load_model
from .checkpoint import Weights, load_weights
from .image_processor import read_preprocessing
from .images import FolderImages, read_images
from .preprocessing import Preprocessing
from .record_file import read_record, read_report
from .saving import load_purified, save_purified

__all__ = [
    "FolderImages",
    "Preprocessing",
    "Weights",
    "load_model",
    "load_purified",
    "load_weights",
    "read_images",
    "read_preprocessing",
    "read_record",
    "read_report",
    "save_purified",
]
