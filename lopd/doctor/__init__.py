"""Looking after a store: what is in it, whether it is sound, how two columns differ, and what a plan will cost.

Functions first; `python -m lopd.doctor info|verify|diff|report|run|compact|estimate` prints or draws what they find.
"""

from lopd.doctor.comparing import Difference as Difference
from lopd.doctor.comparing import Worst as Worst
from lopd.doctor.comparing import compare_columns as compare_columns
from lopd.doctor.contents import AdvantageInfo as AdvantageInfo
from lopd.doctor.contents import ColumnInfo as ColumnInfo
from lopd.doctor.contents import StoreInfo as StoreInfo
from lopd.doctor.contents import describe_advantages as describe_advantages
from lopd.doctor.contents import inspect_store as inspect_store
from lopd.doctor.estimating import Cost as Cost
from lopd.doctor.estimating import Plan as Plan
from lopd.doctor.estimating import Rates as Rates
from lopd.doctor.estimating import estimate as estimate
from lopd.doctor.estimating import measure_rates as measure_rates
from lopd.doctor.estimating import plan_like as plan_like
from lopd.doctor.upkeep import Compaction as Compaction
from lopd.doctor.upkeep import check_store as check_store
from lopd.doctor.upkeep import compact_store as compact_store
