"""What N prompts will cost before anything is spent, by Lightning OPD and by online OPD: `python -m lopd.plan`."""

from lopd.plan.bill import Bill as Bill
from lopd.plan.bill import GpuRates as GpuRates
from lopd.plan.bill import Phase as Phase
from lopd.plan.bill import Work as Work
from lopd.plan.bill import lightning as lightning
from lopd.plan.bill import online as online
from lopd.plan.bill import trained_gb as trained_gb
from lopd.plan.paper import PAPER_LOCKSTEP as PAPER_LOCKSTEP
from lopd.plan.paper import TABLE_2 as TABLE_2
from lopd.plan.paper import lockstep_of as lockstep_of
from lopd.plan.paper import rates_like as rates_like
