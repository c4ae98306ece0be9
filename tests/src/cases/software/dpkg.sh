# A package with hard and symbolic links, a file of configuration and a script comes, is changed, and goes.
cd /srv
mkdir -p p/DEBIAN p/usr/share/p p/etc
printf 'Package: p\nVersion: 1\nArchitecture: all\nMaintainer: a <a@b.example>\nDescription: p\n' >p/DEBIAN/control
echo /etc/p.conf >p/DEBIAN/conffiles
printf '#!/bin/sh\necho configured\n' >p/DEBIAN/postinst
chmod 755 p/DEBIAN/postinst
echo first >p/etc/p.conf
for i in $(seq 200); do echo "$i" >"p/usr/share/p/f$i"; done
ln p/usr/share/p/f1 p/usr/share/p/hard
ln -s f2 p/usr/share/p/symbolic
dpkg-deb --root-owner-group -b p p.deb >/dev/null
dpkg -i p.deb 2>/dev/null | tail -n 1
ls /usr/share/p | wc -l
stat -c %h /usr/share/p/f1
dpkg -V p
echo changed >>/usr/share/p/f9
dpkg -V p
dpkg -i p.deb >/dev/null 2>&1
dpkg -V p
dpkg -r p >/dev/null 2>&1
ls /usr/share/p /etc/p.conf 2>&1
dpkg -P p >/dev/null 2>&1
ls /etc/p.conf 2>&1
dpkg --audit
