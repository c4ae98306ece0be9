# A tree of a thousand files is copied, packed, unpacked, compared, linked and removed.
cd /srv
cp -a /usr/lib/python3.13 a
tar -cf t.tar a
mkdir b
tar -xf t.tar -C b
diff -r a b/a && echo same
[ "$(find a -type f | wc -l)" = "$(find /usr/lib/python3.13 -type f | wc -l)" ] && echo complete
find a -newer t.tar | wc -l
rm -rf a
ls
cp -al b/a l
[ "$(find l -type f -links 2 | wc -l)" = "$(find b -type f | wc -l)" ] && echo linked
rm -rf b l
ls -A
dd if=/dev/zero of=big bs=1M count=64 2>/dev/null
cp --sparse=always big sparse
cmp big sparse && du -k sparse | cut -f1
