"""Plans as nnU-Net 2.8.1 makes and reads them: for people who train with it and for comparison.

``plans(dataset_json, fingerprint, preset="resenc-l")`` is the content of ``nnUNetResEncUNetLPlans.json``;
`read_plans_file` understands any plans file of its, old or new, and `write_plans_file` writes one.

Reading and writing need no planner; it is imported when `plans` is first used.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from segfit.nnunet.plans_reader import PlansFile, read_plans_file, write_plans_file

if TYPE_CHECKING:
    from segfit.nnunet.planner import plans

__all__ = ["PlansFile", "plans", "read_plans_file", "write_plans_file"]


def __getattr__(name: str) -> Any:
    if name == "plans":
        from segfit.nnunet.planner import plans

        return plans
    raise AttributeError(f"module 'segfit.nnunet' has no attribute {name!r}")
