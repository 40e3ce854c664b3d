"""Train without a teacher (`qskd train`): the same driver as `pipelines.distill`.

python -m pipelines.train configs/shapes_teacher.yaml
"""

from pipelines.cli import main_of

if __name__ == "__main__":
    main_of("train")
