# Three writers at a time, with a write-ahead log, which is a shared mapping and locks of ranges.
cd /srv
sqlite3 a.db 'pragma journal_mode=wal; create table t(a integer primary key, b text);'
for writer in 1 2 3; do
    for i in $(seq 20); do sqlite3 -cmd '.timeout 20000' a.db "insert into t(b) values('$writer $i')" || echo failed; done &
done
wait
sqlite3 a.db 'select count(*), count(distinct b) from t; pragma integrity_check;'
sqlite3 a.db 'pragma journal_mode=delete; begin; delete from t; rollback; select count(*) from t; vacuum;'
ls
