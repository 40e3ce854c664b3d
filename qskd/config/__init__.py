"""The whole configuration of a run, strict and frozen (light: pydantic only)."""

from qskd.config.augmentation import AugmentationConfig as AugmentationConfig
from qskd.config.backbone import BackboneConfig as BackboneConfig
from qskd.config.distillation import DistillationConfig as DistillationConfig
from qskd.config.distillation import MethodSettings as MethodSettings
from qskd.config.images import ResizeConfig as ResizeConfig
from qskd.config.images import ViewConfig as ViewConfig
from qskd.config.section import Fraction as Fraction
from qskd.config.section import NonNegative as NonNegative
from qskd.config.section import Positive as Positive
from qskd.config.section import Section as Section
from qskd.config.sections import CardConfig as CardConfig
from qskd.config.sections import ComputeConfig as ComputeConfig
from qskd.config.sections import Config as Config
from qskd.config.sections import DataConfig as DataConfig
from qskd.config.sections import DetectionLossConfig as DetectionLossConfig
from qskd.config.sections import FurtherTeacherConfig as FurtherTeacherConfig
from qskd.config.sections import TeacherCacheConfig as TeacherCacheConfig
from qskd.config.sections import TeacherConfig as TeacherConfig
from qskd.config.sections import TrackingConfig as TrackingConfig
from qskd.config.sections import TrainingConfig as TrainingConfig
from qskd.config.student import StudentConfig as StudentConfig
from qskd.families.facts import BOXES_ALONE as BOXES_ALONE
from qskd.families.facts import FACTS as FACTS
from qskd.families.facts import ONNX as ONNX
from qskd.families.facts import TEACHERS_ONLY as TEACHERS_ONLY
from qskd.families.facts import Family as Family
