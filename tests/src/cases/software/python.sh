# A large import, byte code that is written and used again, and files that processes share.
cd /srv
mkdir many
for i in $(seq 100); do echo "value = $i" >"many/m$i.py"; done
cat >a.py <<'P'
import asyncio, ctypes, email, http.client, json, logging, multiprocessing, sqlite3, ssl, tempfile, unittest, xml.dom.minidom
import fcntl, mmap, os, shutil
import importlib, sys
sys.path.insert(0, 'many')
print(sum(importlib.import_module(f'm{i}').value for i in range(1, 101)))
print(len(os.listdir('many/__pycache__')))
with tempfile.NamedTemporaryFile() as shared:
    shared.truncate(4096)
    view = mmap.mmap(shared.fileno(), 4096)
    if os.fork() == 0:
        fcntl.flock(os.open(shared.name, os.O_RDWR), fcntl.LOCK_EX)
        view[0:4] = b'fork'
        os._exit(7)
    print(os.waitstatus_to_exitcode(os.wait()[1]), view[0:4])
with tempfile.TemporaryFile() as unnamed:
    unnamed.write(b'x' * 5000)
    print(unnamed.tell())
with multiprocessing.Pool(4) as pool:
    print(sum(pool.map(abs, range(-100, 0))))
shutil.copytree('many', 'copied')
shutil.rmtree('many')
print(len(os.listdir('copied')))
os.sendfile(os.open('sent', os.O_CREAT | os.O_WRONLY), os.open('copied/m9.py', os.O_RDONLY), 0, 100)
print(open('sent').read().strip())
P
python3 a.py
