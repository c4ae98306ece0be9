# A repository is made, cloned, packed and checked.
cd /srv
export HOME=/root
git config --global user.email a@b.example
git config --global user.name n
git init -q -b main made
cd made
for i in $(seq 300); do echo "$i" >"f$i"; done
git add .
git commit -qm one
git mv f1 g1
echo more >>f2
git commit -qam two
cd ..
git clone -q made cloned
cd cloned
git log --format=%s
git status --short | wc -l
git gc -q
git fsck 2>&1
git checkout -q HEAD~1
ls | wc -l
cat f1 f2
git worktree add -q ../third main
cmp ../third/f2 ../made/f2 && echo same
