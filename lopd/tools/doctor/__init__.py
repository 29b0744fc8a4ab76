"""Looking after a store: what is in it, whether it is sound, and how two columns differ.

`lopd info|verify|diff` prints what these functions find.
"""

from lopd.tools.doctor.checking import check_store as check_store
from lopd.tools.doctor.comparing import Difference as Difference
from lopd.tools.doctor.comparing import Worst as Worst
from lopd.tools.doctor.comparing import compare_columns as compare_columns
from lopd.tools.doctor.contents import AdvantageInfo as AdvantageInfo
from lopd.tools.doctor.contents import ColumnInfo as ColumnInfo
from lopd.tools.doctor.contents import StoreInfo as StoreInfo
from lopd.tools.doctor.contents import describe_advantages as describe_advantages
from lopd.tools.doctor.contents import inspect_store as inspect_store
