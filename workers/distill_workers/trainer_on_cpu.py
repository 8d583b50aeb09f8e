"""`python -m distill_workers.trainer_on_cpu` is `python -m distill_workers.trainer` for machines without an
accelerator, where it starts sooner (cpu/lean_imports.py)."""

from distill_workers.cpu.lean_imports import lean_imports


def import_trainer() -> None:
    """Import what the trainer needs."""
    with lean_imports():
        import distill_workers.trainer  # noqa: F401


def main() -> None:
    import_trainer()
    from distill_workers import trainer

    trainer.run_and_exit()


if __name__ == "__main__":
    main()
