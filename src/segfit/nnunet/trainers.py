"""Trainers of nnU-Net 2.8.1 whose networks are those of the plans.

A trainer may build any network, also one of other function with weights of the same names: what a model of an unknown
one would predict here cannot be known. Those of Primus (transformers) are left out.
"""

from __future__ import annotations

__all__ = ["TRAINERS"]

_NAMES = """
nnUNetTrainerNoMirroring nnUNetTrainer_onlyMirror01 nnUNetTrainer_onlyMirror01_1500ep
nnUNetTrainer_onlyMirror01_DASegOrd0 nnUNetTrainer_DASegOrd0 nnUNetTrainer_DASegOrd0_NoMirroring nnUNetTrainerNoDA
nnUNetTrainer_noDummy2DDA nnUNetTrainerDA5 nnUNetTrainerDA5ord0 nnUNetTrainerDA5Segord0 nnUNetTrainerDA5_10epochs
nnUNetTrainer_onlyMirror01_DA5 nnUNetTrainerCELoss nnUNetTrainerCELoss_5epochs nnUNetTrainerDiceLoss
nnUNetTrainerDiceCELoss_noSmooth nnUNetTrainerTopk10Loss nnUNetTrainerTopk10LossLS01 nnUNetTrainerDiceTopK10Loss
nnUNetTrainerCosAnneal nnUNetTrainer_warmup nnUNetTrainerAdam nnUNetTrainerAdam1en3 nnUNetTrainerAdam3en4
nnUNetTrainerVanillaAdam nnUNetTrainerVanillaAdam1en3 nnUNetTrainerVanillaAdam3en4 nnUNetTrainerAdan
nnUNetTrainerAdan1en3 nnUNetTrainerAdan3en4 nnUNetTrainerAdan1en1 nnUNetTrainerAdanCosAnneal nnUNetTrainerBN
nnUNetTrainerNoDeepSupervision nnUNetTrainer_probabilisticOversampling nnUNetTrainer_probabilisticOversampling_033
nnUNetTrainer_probabilisticOversampling_010 nnUNetTrainerBenchmark_5epochs nnUNetTrainerBenchmark_5epochs_noDataLoading
"""
_EPOCHS = (5, 10, 20, 50, 100, 250, 500, 750, 2000, 4000, 8000)
_EPOCHS_WITHOUT_MIRRORING = (250, 2000, 4000, 8000)

TRAINERS = frozenset(
    [
        "nnUNetTrainer",
        *_NAMES.split(),
        "nnUNetTrainer_1epoch",
        *(f"nnUNetTrainer_{epochs}epochs" for epochs in _EPOCHS),
        *(f"nnUNetTrainer_{epochs}epochs_NoMirroring" for epochs in _EPOCHS_WITHOUT_MIRRORING),
    ]
)
