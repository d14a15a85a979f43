"""The metadata database: one LMDB environment, one writer thread, JSON records in named tables.

database     the environment, its tables and transactions
pagecheck    reading its pages without LMDB, which ends the process on some damaged ones
"""
