"""All ways to be wrong that `verify` must find."""

from __future__ import annotations

from verify import (
    faults_cache,
    faults_config,
    faults_distilled,
    faults_files,
    faults_folds,
    faults_fp8,
    faults_gptq,
    faults_head,
    faults_mixed,
    faults_numbers,
    faults_seen,
    faults_tools,
)

FAULTS = [
    *faults_cache.FAULTS,
    *faults_config.FAULTS,
    *faults_distilled.FAULTS,
    *faults_files.FAULTS,
    *faults_folds.FAULTS,
    *faults_fp8.FAULTS,
    *faults_gptq.FAULTS,
    *faults_mixed.FAULTS,
    *faults_head.FAULTS,
    *faults_numbers.FAULTS,
    *faults_seen.FAULTS,
    *faults_tools.FAULTS,
]
