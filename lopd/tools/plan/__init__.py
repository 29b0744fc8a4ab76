"""What N prompts will cost, by Lightning OPD and by online OPD, and what fits on a card: `lopd plan`."""

from lopd.tools.plan.bill import Bill as Bill
from lopd.tools.plan.bill import GpuRates as GpuRates
from lopd.tools.plan.bill import Phase as Phase
from lopd.tools.plan.bill import lightning as lightning
from lopd.tools.plan.bill import online as online
from lopd.tools.plan.bill import trained_gb as trained_gb
from lopd.tools.plan.fit import ROOM as ROOM
from lopd.tools.plan.fit import Fit as Fit
from lopd.tools.plan.fit import PhaseFit as PhaseFit
from lopd.tools.plan.fit import fits as fits
from lopd.tools.plan.following import lora_config as lora_config
from lopd.tools.plan.like import measured_rates as measured_rates
from lopd.tools.plan.like import work_like as work_like
from lopd.tools.plan.live import Need as Need
from lopd.tools.plan.memory import Use as Use
from lopd.tools.plan.memory import sampling as sampling
from lopd.tools.plan.memory import scoring as scoring
from lopd.tools.plan.memory import training as training
from lopd.tools.plan.paper import PAPER_LOCKSTEP as PAPER_LOCKSTEP
from lopd.tools.plan.paper import TABLE_2 as TABLE_2
from lopd.tools.plan.paper import lockstep_of as lockstep_of
from lopd.tools.plan.paper import rates_like as rates_like
from lopd.tools.plan.work import StoreSize as StoreSize
from lopd.tools.plan.work import Work as Work
