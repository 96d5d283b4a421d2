"""``python -m megatron_dypo`` and ``torchrun -m megatron_dypo``, guarded: helper processes re-run ``__main__``."""

from megatron_dypo.cli import script

if __name__ == "__main__":
    script()
