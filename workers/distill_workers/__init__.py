"""The workers: teacher, rollout engines and trainer of an on-policy distillation. Never imports kopf or kubernetes."""
