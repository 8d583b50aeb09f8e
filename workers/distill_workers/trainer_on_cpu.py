"""`python -m distill_workers.trainer_on_cpu` is `python -m distill_workers.trainer` for machines without an
accelerator, where it starts sooner (cpu/lean_imports.py)."""

from distill_workers.cpu.lean_imports import lean_imports


def main() -> None:
    with lean_imports():
        from distill_workers import trainer

    trainer.run_and_exit()


if __name__ == "__main__":
    main()
