# A program from source, with threads, a file that is mapped, and garbage.
cd /srv
cat >A.java <<'P'
import java.nio.channels.FileChannel;
import java.nio.file.*;
import java.util.stream.IntStream;

public class A {
    public static void main(String[] arguments) throws Exception {
        System.out.println(IntStream.rangeClosed(1, 1000).parallel().sum());
        Path file = Files.createTempFile("a", "b");
        try (FileChannel channel = FileChannel.open(file, StandardOpenOption.READ, StandardOpenOption.WRITE)) {
            channel.map(FileChannel.MapMode.READ_WRITE, 0, 8192).putInt(4096, 77);
            System.out.println(channel.size() + " " + channel.lock().isValid());
        }
        System.out.println(Files.readAllBytes(file)[4099]);
        long made = 0;
        for (int i = 0; i < 2000; i++) made += new byte[100_000].length;
        System.out.println(made);
    }
}
P
java -Xmx64m -version 2>&1 | grep -c Server
# Compiled in memory: what is installed has no more of a compiler.
java -Xmx64m -XX:+UseParallelGC -cp /srv A.java 2>&1
