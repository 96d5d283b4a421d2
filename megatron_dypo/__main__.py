"""``python -m megatron_dypo`` and ``torchrun -m megatron_dypo``. Helper processes that re-run ``__main__`` find it guarded."""

from megatron_dypo.cli import main

if __name__ == "__main__":
    raise SystemExit(main())
