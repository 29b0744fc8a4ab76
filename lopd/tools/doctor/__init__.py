"""Looking after a store: what is in it, whether it is sound, how two columns differ, and what a plan will cost.

Functions first; `python -m lopd.tools.doctor info|verify|diff|report|run|compact|estimate` prints or draws what they find.
"""

from lopd.tools.doctor.comparing import Difference as Difference
from lopd.tools.doctor.comparing import Worst as Worst
from lopd.tools.doctor.comparing import compare_columns as compare_columns
from lopd.tools.doctor.contents import AdvantageInfo as AdvantageInfo
from lopd.tools.doctor.contents import ColumnInfo as ColumnInfo
from lopd.tools.doctor.contents import StoreInfo as StoreInfo
from lopd.tools.doctor.contents import describe_advantages as describe_advantages
from lopd.tools.doctor.contents import inspect_store as inspect_store
from lopd.tools.doctor.estimating import Cost as Cost
from lopd.tools.doctor.estimating import Plan as Plan
from lopd.tools.doctor.estimating import Rates as Rates
from lopd.tools.doctor.estimating import estimate as estimate
from lopd.tools.doctor.estimating import measure_rates as measure_rates
from lopd.tools.doctor.estimating import plan_like as plan_like
from lopd.tools.doctor.upkeep import Compaction as Compaction
from lopd.tools.doctor.upkeep import check_store as check_store
from lopd.tools.doctor.upkeep import compact_store as compact_store
