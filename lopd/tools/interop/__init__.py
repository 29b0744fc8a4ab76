"""Rollouts and log-probs for other people's tools: torch datasets, parquet, Hugging Face `datasets`, the authors' own files, text, trajectories."""

from lopd.tools.interop.authors import AuthorsReport as AuthorsReport
from lopd.tools.interop.authors import import_authors_parquet as import_authors_parquet
from lopd.tools.interop.huggingface import from_hf_dataset as from_hf_dataset
from lopd.tools.interop.huggingface import hf_dataset_manifest as hf_dataset_manifest
from lopd.tools.interop.huggingface import to_hf_dataset as to_hf_dataset
from lopd.tools.interop.imports import import_text as import_text
from lopd.tools.interop.imports import import_trajectories as import_trajectories
from lopd.tools.interop.parquet import export_parquet as export_parquet
from lopd.tools.interop.parquet import import_parquet as import_parquet
from lopd.tools.interop.parquet import parquet_manifest as parquet_manifest
from lopd.tools.interop.torch_dataset import TorchDataset as TorchDataset
