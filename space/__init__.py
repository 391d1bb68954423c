"""What a schedule is: a value, its choices, and its meaning as a program."""

from fewstep.space import noise
from fewstep.space.errors import FewstepError, ModelError, ScheduleError, StudyError
from fewstep.space.files import load_schedule, save_schedule
from fewstep.space.masked import CallSpec, MaskedSchedule
from fewstep.space.particles import ParticleSchedule, ParticleStep
from fewstep.space.program import Program, ProgramSchedule, compile, stack
from fewstep.space.schedule import OdeSchedule, StepSpec

__all__ = [
    "CallSpec",
    "FewstepError",
    "MaskedSchedule",
    "ModelError",
    "OdeSchedule",
    "ParticleSchedule",
    "ParticleStep",
    "Program",
    "ProgramSchedule",
    "ScheduleError",
    "StepSpec",
    "StudyError",
    "compile",
    "load_schedule",
    "noise",
    "save_schedule",
    "stack",
]
